"""The HTTP service: who may call, what each path answers, and what happens when a caller leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from privinf.client.look import missing
from privinf.gateway.completions import add_completions
from privinf.gateway.door import METRICS, Door, Place
from privinf.gateway.engine import Engine
from privinf.gateway.limits import Bounds
from privinf.gateway.metrics import Requests, families
from privinf.gateway.models import Models, add_models
from privinf.gateway.page import Watch, add_page
from privinf.gateway.responses import add_responses
from privinf.gateway.waits import CallerGone
from privinf.gateway.wire import ApiError, as_api_error, malformed_body
from privinf.session.metrics import registry_of
from privinf.session.readiness import Readiness

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
    answers, models = requests or Requests(), Models(engine, name)
    app.add_middleware(Door, key=api_key, requests=answers, bounds=bounds or Bounds(), place=place or Place())
    _add_errors(app)
    _add_operation(app, engine, answers)
    add_models(app, models)
    add_completions(app, engine, models)
    add_responses(app, engine, models)
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
    registry, ready = registry_of(lambda: families(engine, answers)), Readiness()

    def look() -> str:
        return missing(engine.client.peers, engine.model.lowered.id)

    @app.get("/healthz")
    async def healthz() -> Response:
        status, code = ("stopping", 503) if answers.draining else ("ok", 200)
        return JSONResponse({"status": status, "model": engine.model.lowered.id}, code)

    @app.get("/readyz")
    async def readyz() -> Response:
        why = "stopping" if answers.draining else await asyncio.to_thread(ready.why, look)
        return JSONResponse({"status": why or "ok", "model": engine.model.lowered.id}, 503 if why else 200)

    @app.get(METRICS)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
