"""The page: a prompt, the tokens as they arrive, and beside it what each party has seen."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any, Protocol

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from sse_starlette.sse import EventSourceResponse

from privinf.client.sampling import Sampling
from privinf.gateway.asked import Temperature
from privinf.gateway.engine import Answer, Engine, Query
from privinf.gateway.wire import as_api_error
from privinf.gateway.writer import usage
from privinf.session.pace import kept, seconds
from privinf.session.report import counters, model_of
from privinf.transport.meter import PHASES, Cell
from privinf.trust import DEALER, ENCRYPTED, TEXTS
from protocols import kernels

TICK_S, PROMPT = 0.1, 64
FILES = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css")}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Watch(Protocol):
    """What the local server and dealer of a demo have received."""

    def since(self, number: int) -> tuple[int, list[dict[str, Any]]]:
        """The messages after this number, and the number of the last."""

    @property
    def seen_traffic(self) -> dict[str, Any]:
        """{`server`, and `dealer` if there is one: the contract's `traffic` of the party}."""


class PageRequest(BaseModel):
    """POST /page/reply."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    prompt: Annotated[StrictStr, Field(max_length=1 << 20)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] = 32
    temperature: Temperature = 0.0


def add_page(app: FastAPI, engine: Engine, watch: Watch | None) -> None:
    """The page's files, which are part of the package, and its stream."""

    def serve(path: str, name: str, kind: str) -> None:
        body = (resources.files("privinf.gateway") / "page" / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(body, media_type=kind, headers=HEADERS)

    for path, (name, kind) in FILES.items():
        serve(path, name, kind)

    @app.get("/page/about")
    async def about() -> dict[str, Any]:
        shown = engine.model
        model = {**model_of(shown.lowered), "n_positions": shown.lowered.info.n_positions}
        trust = {"name": shown.trust, "text": TEXTS[shown.trust]}
        parties = {"server": engine.client.peers.server}
        if shown.trust == DEALER:
            parties["dealer"] = str(engine.client.peers.dealer)
        here = {"logits": shown.logits, "demo": watch is not None, "parties": parties}
        return {"model": model, "trust": trust, **here, "pace": await asyncio.to_thread(_pace, engine)}

    @app.post("/page/reply", response_model=None)
    async def reply(body: PageRequest) -> Response:
        try:
            query = Query(body.prompt, body.max_tokens, Sampling(body.temperature))
        except Exception as error:
            raise as_api_error(error) from error
        return EventSourceResponse(_events(engine, query, watch), sep="\n")


def _pace(engine: Engine) -> dict[str, Any] | None:
    """{`prompt_tokens`, and what `session.pace.seconds` says, `machine` in words}: of loopback, by the kept measurement of this machine.

    None where there is none, or no dealer, or rows come from an encrypted table, of which it says nothing.
    """
    shown, options = engine.model, engine.client.options
    found = kept(options.cache, options.device, kernels.status())
    if found is None or shown.trust != DEALER or options.embedding == ENCRYPTED:
        return None
    count = min(PROMPT, shown.lowered.info.n_positions)
    return {"prompt_tokens": count, **seconds(shown.lowered, found, None, count), "machine": found.speeds()}


async def _events(engine: Engine, query: Query, watch: Watch | None) -> AsyncIterator[dict[str, Any]]:
    """`begin` (how many tokens there will be at most), `token`, `seen`, `counters`, and at the end `done` or `error`."""
    reply, seen = Answer(), watch.since(-1)[0] if watch else 0
    base = {key: _copy(cell) for key, cell in engine.conversations.cells().items()}
    theirs = watch.seen_traffic if watch else {}
    told: dict[str, Any] = {}
    begun = False
    async with contextlib.aclosing(engine.stream(query, reply)) as tokens:  # type: ignore[type-var]
        waiting = asyncio.ensure_future(anext(tokens, None))
        try:
            while True:
                await asyncio.wait({waiting}, timeout=TICK_S)
                if watch is not None:
                    seen, messages = watch.since(seen)
                    if messages:
                        yield _event("seen", messages)
                if (now := _counters(engine, base, watch, theirs)) != told:
                    told = now
                    yield _event("counters", now)
                if not waiting.done():
                    continue
                token = waiting.result()
                if token is None:
                    break
                if not begun:
                    begun = True
                    room = engine.model.lowered.info.n_positions - reply.prompt_tokens + 1
                    most = min(query.max_new_tokens, engine.limits.new_tokens, room)
                    yield _event("begin", {"prompt_tokens": reply.prompt_tokens, "most": most})
                yield _event("token", {"id": token.id, "text": token.text})
                waiting = asyncio.ensure_future(anext(tokens, None))
            if watch is not None:
                await asyncio.sleep(3 * TICK_S)  # what the others tell of the last round is still on its way
                yield _event("seen", watch.since(seen)[1])
            yield _event("counters", _counters(engine, base, watch, theirs))
            yield _event("done", {"finish_reason": reply.finish_reason, "usage": usage(reply)})
        except Exception as error:
            yield _event("error", as_api_error(error).body["error"])
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def _event(name: str, data: Any) -> dict[str, Any]:
    return {"event": name, "data": json.dumps(data, ensure_ascii=False)}


def _copy(cell: Cell) -> Cell:
    made = Cell()
    made.add(cell)
    return made


def _counters(engine: Engine, base: dict[tuple[str, str], Cell], watch: Watch | None, theirs: dict[str, Any]) -> dict[str, Any]:
    """What moved since `base`, as each party counts it; of a remote party only what this one sent and received."""
    now = engine.conversations.cells()
    moved = {place: _minus(counters(cell), counters(base[place])) for place, cell in now.items()}
    own = {peer: {phase: moved[peer, phase] for phase in PHASES} for peer in ("server", "dealer")}
    others = {role: _minus(traffic, theirs.get(role, {})) for role, traffic in watch.seen_traffic.items()} if watch is not None else {}
    return {"client": own, **others}


def _minus(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _minus(value, before.get(name, {})) if isinstance(value, dict) else value - before.get(name, 0) for name, value in now.items()
    }
