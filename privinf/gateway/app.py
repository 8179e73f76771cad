"""The HTTP service: who may call, what each path answers, and what happens when a caller leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
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
from privinf.gateway.merged import Piece, together
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
    answers, models = requests or Requests(), _Models(engine, name)
    app.add_middleware(Door, key=api_key, requests=answers, bounds=bounds or Bounds(), place=place or Place())
    _add_errors(app)
    _add_operation(app, engine, answers)
    _add_models(app, models)
    _add_completions(app, engine, models)
    _add_chat(app, engine, models)
    add_page(app, engine, watch)
    return app


def _add_errors(app: FastAPI) -> None:
    """Whatever fails before a reply begins is answered in OpenAI's form."""

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


def _add_operation(app: FastAPI, engine: Engine, answers: Requests) -> None:
    """What operators ask: is it there, and how does it do."""
    registry = registry_of(lambda: families(engine, answers))

    @app.get("/healthz")
    async def healthz() -> Response:
        status, code = ("stopping", 503) if answers.draining else ("ok", 200)
        return JSONResponse({"status": status, "model": engine.model.lowered.id}, code)

    @app.get(METRICS)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Models:
    """The one model, by its name and by its id."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self.names, self._started = engine, (name, engine.model.lowered.id), int(time.time())

    def described(self, model: str) -> dict[str, Any]:
        lowered = self._engine.model.lowered
        about = {
            "context_length": lowered.info.n_positions,
            "variant": lowered.info.variant,
            "logits": self._engine.model.logits,
            "fingerprint": lowered.id,
        }
        return {"id": model, "object": "model", "created": self._started, "owned_by": "privinf", "privinf": about}

    def check(self, model: str) -> None:
        """ApiError for another one."""
        if model not in self.names:
            message = f"there is no model {model[:100]!r} here; there is {self.names[0]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


def _add_models(app: FastAPI, models: _Models) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [models.described(model) for model in models.names]}

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> dict[str, Any]:
        models.check(model)
        return models.described(model)


def _add_completions(app: FastAPI, engine: Engine, models: _Models) -> None:
    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        models.check(body.model)
        body.check()
        with _as_api_errors():
            length, choices = body.max_tokens or COMPLETION_TOKENS, body.choices()
            queries = [Query(prompt, length, choice, body.ignore_eos) for prompt in body.prompts for choice in choices]
        return await _answer(engine, request, body, queries, Writer(body.model, chat=False))


def _add_chat(app: FastAPI, engine: Engine, models: _Models) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        models.check(body.model)
        body.check()
        maker = engine.model.chat
        with _as_api_errors():
            choices = body.choices(maker.stop)
            prompt = await while_there(request, maker.prompt([message.plain() for message in body.messages]))
        count = body.max_completion_tokens or body.max_tokens or engine.limits.new_tokens
        queries = [Query(prompt, count, choice, body.ignore_eos, special_tokens=maker.plain) for choice in choices]
        return await _answer(engine, request, body, queries, Writer(body.model, chat=True), maker.shown)


async def _answer(
    engine: Engine,
    request: Request,
    body: CompletionRequest | ChatRequest,
    queries: Sequence[Query],
    writer: Writer,
    shown: Callable[..., str] = lambda text, first: text,
) -> Response:
    """The replies, whole or as a stream; what goes wrong with one of them ends all."""
    replies = [Answer() for _ in queries]
    pieces = [_pieces(engine.stream(query, reply), shown) for query, reply in zip(queries, replies, strict=True)]
    merged = together(pieces)
    with _as_api_errors():
        if not body.stream:
            texts = [""] * len(queries)
            for index, piece in await while_there(request, _all(merged)):
                texts[index] += piece or ""
            return JSONResponse(writer.whole(texts, replies))
        # the status is decided by the first token: until it has come, a refusal still is one
        first = await while_there(request, anext(merged))
    options = body.stream_options
    usage = bool(options and options.include_usage)
    return EventSourceResponse(_events(first, merged, replies, writer, usage), ping=PING_S, sep="\n")


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    """What goes wrong within is told to the caller, if there is one left."""
    try:
        yield
    except CallerGone:
        raise
    except Exception as error:
        raise as_api_error(error) from error


async def _pieces(tokens: AsyncIterator[Token], shown: Callable[..., str]) -> AsyncIterator[str]:
    """Texts as they come; ids where the model has no tokenizer, with blanks between."""
    first = True
    async with contextlib.aclosing(tokens) as every:  # type: ignore[type-var]
        async for token in every:
            text = f"{'' if first else ' '}{token.id}" if token.text is None else shown(token.text, first=first)
            first = first and not token.text and token.text is not None
            yield text


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _events(
    first: Piece, pieces: AsyncIterator[Piece], replies: Sequence[Answer], writer: Writer, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; an error in the middle is an event too."""

    def event(index: int, text: str | None) -> dict[str, Any] | None:
        if text is None:
            return {"data": writer.piece(index=index, finish=replies[index].finish_reason)}
        return {"data": writer.piece(text, index=index)} if text else None

    async with contextlib.aclosing(pieces) as rest:  # type: ignore[type-var]
        for index in range(len(replies)) if writer.chat else ():
            yield {"data": writer.piece(index=index, first=True)}
        try:
            if (said := event(*first)) is not None:
                yield said
            async for piece in rest:
                if (said := event(*piece)) is not None:
                    yield said
        except Exception as error:
            yield {"data": json.dumps(as_api_error(error).body, ensure_ascii=False)}
            return
        if usage:
            yield {"data": writer.last(*replies)}
        yield {"data": "[DONE]"}
