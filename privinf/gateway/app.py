"""The HTTP service: who may call, what each path answers, and what happens when a caller leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException

from privinf.client.text import Token
from privinf.gateway.door import METRICS, Door, Place
from privinf.gateway.engine import Answer, Engine, Query
from privinf.gateway.limits import Bounds
from privinf.gateway.metrics import Requests, families
from privinf.gateway.page import Watch, add_page
from privinf.gateway.waits import CallerGone, while_there
from privinf.gateway.wire import COMPLETION_TOKENS, ApiError, ChatRequest, CompletionRequest, Writer, as_api_error, malformed_body
from privinf.session.metrics import registry_of

PING_S = 15
logging.getLogger("sse_starlette").setLevel(logging.INFO)  # below that it logs every piece of a reply


def create_app(
    engine: Engine,
    *,
    api_key: str,
    name: str = "privinf",
    watch: Watch | None = None,
    bounds: Bounds | None = None,
    requests: Requests | None = None,
    place: Place | None = None,
) -> FastAPI:
    """The service over a started engine; `name` is the model's, beside its id. `watch` shows what the local parties of a demo get."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        evicting = asyncio.create_task(engine.evict())
        yield
        evicting.cancel()

    app = FastAPI(title="privinf", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    answers = requests or Requests()
    registry = registry_of(lambda: families(engine, answers))
    app.add_middleware(Door, key=api_key, requests=answers, bounds=bounds or Bounds(), place=place or Place())

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return malformed_body(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        what = str(error.detail)
        if error.status_code in (404, 405):
            what = f"there is no {request.method} {request.url.path[:200]} here"
        elif error.status_code == 400:  # FastAPI's own, which does not say what it could not read
            what = "the body cannot be read as JSON in UTF-8"
        answer = ApiError(error.status_code, what).response()
        answer.headers.update(error.headers or {})  # which methods there are, for a wrong one
        return answer

    @app.exception_handler(CallerGone)
    async def gone(_: Request, error: CallerGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    @app.get("/healthz")
    async def healthz() -> Response:
        status, code = ("stopping", 503) if answers.draining else ("ok", 200)
        return JSONResponse({"status": status, "model": engine.lowered.id}, code)

    @app.get(METRICS)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def described(model: str) -> dict[str, Any]:
        info = engine.lowered.info
        about = {"context_length": info.n_positions, "variant": info.variant, "logits": engine.logits, "fingerprint": engine.lowered.id}
        return {"id": model, "object": "model", "created": started, "owned_by": "privinf", "privinf": about}

    started, models = int(time.time()), (name, engine.lowered.id)

    def check_model(model: str) -> None:
        if model not in models:
            message = f"there is no model {model[:100]!r} here; there is {name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(model) for model in models]}

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> dict[str, Any]:
        check_model(model)
        return described(model)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        check_model(body.model)
        body.check()
        try:
            query = Query(body.single, body.max_tokens or COMPLETION_TOKENS, body.sampling(), body.ignore_eos)
        except Exception as error:
            raise as_api_error(error) from error
        return await answer(request, body, query, Writer(body.model, chat=False))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        check_model(body.model)
        body.check()
        maker = engine.chat
        try:
            sampling = body.sampling(maker.stop)
            prompt = await while_there(request, maker.prompt([message.plain() for message in body.messages]))
        except CallerGone:
            raise
        except Exception as error:
            raise as_api_error(error) from error
        count = body.max_completion_tokens or body.max_tokens or engine.limits.new_tokens
        query = Query(prompt, count, sampling, body.ignore_eos, special_tokens=maker.plain)
        return await answer(request, body, query, Writer(body.model, chat=True), maker.shown)

    async def answer(
        request: Request,
        body: CompletionRequest | ChatRequest,
        query: Query,
        writer: Writer,
        shown: Callable[..., str] = lambda text, first: text,
    ) -> Response:
        reply = Answer()
        pieces = _pieces(engine.stream(query, reply), shown)
        try:
            if not body.stream:
                text = "".join(await while_there(request, _all(pieces)))
                return JSONResponse(writer.whole(text, reply))
            # the status is decided by the first token: until it has come, a refusal still is one
            first = await while_there(request, anext(pieces, None))
        except CallerGone:
            raise
        except Exception as error:
            raise as_api_error(error) from error
        options = body.stream_options
        usage = bool(options and options.include_usage)
        return EventSourceResponse(_events(first, pieces, reply, writer, usage), ping=PING_S, sep="\n")

    add_page(app, engine, watch)
    return app


async def _pieces(tokens: AsyncIterator[Token], shown: Callable[..., str]) -> AsyncIterator[str]:
    """Texts as they come; ids where the model has no tokenizer, with blanks between."""
    first = True
    async with contextlib.aclosing(tokens) as every:  # type: ignore[type-var]
        async for token in every:
            text = f"{'' if first else ' '}{token.id}" if token.text is None else shown(token.text, first=first)
            first = first and not token.text and token.text is not None
            yield text


async def _all(pieces: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in pieces]


async def _events(
    first: str | None, pieces: AsyncIterator[str], reply: Answer, writer: Writer, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; an error in the middle is an event too."""
    async with contextlib.aclosing(pieces) as rest:  # type: ignore[type-var]
        if writer.chat:
            yield {"data": writer.piece(first=True)}
        try:
            if first:
                yield {"data": writer.piece(first)}
            async for piece in rest:
                if piece:
                    yield {"data": writer.piece(piece)}
        except Exception as error:
            yield {"data": json.dumps(as_api_error(error).body, ensure_ascii=False)}
            return
        yield {"data": writer.piece(finish=reply.finish_reason)}
        if usage:
            yield {"data": writer.last(reply)}
        yield {"data": "[DONE]"}
