"""Completions and chats over HTTP: what a body asks for, the replies to it, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette.sse import EventSourceResponse

from privinf.client.sampling import Sampling
from privinf.client.text import Token
from privinf.gateway import tools
from privinf.gateway.asked import MAX_CHOICES, AnyRequest, ChatRequest, CompletionRequest
from privinf.gateway.engine import Answer, Engine, Query
from privinf.gateway.merged import Piece, together
from privinf.gateway.models import Models
from privinf.gateway.waits import CallerGone, while_there
from privinf.gateway.wire import ApiError, as_api_error
from privinf.gateway.writer import Said, Writer

PING_S = 15
COMPLETION_TOKENS = 16
"""The longest completion where the caller names no length; a chat's reply then is as long as the gateway allows."""


def add_completions(app: FastAPI, engine: Engine, models: Models) -> None:
    """Their two paths."""

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        models.check(body.model)
        with as_api_errors():
            choices = await choices_of(engine, body)
            if (number := len(choices) * len(body.prompts)) > MAX_CHOICES:
                raise ApiError(400, f"n times the prompts: at most {MAX_CHOICES} replies at a time, not {number}", param="n")
            length = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
            logprobs: dict[str, Any] = {"logprobs": body.alternatives, "score_prompt": body.echo and body.alternatives is not None}
            queries = [Query(prompt, length, choice, body.ignore_eos, **logprobs) for prompt in body.prompts for choice in choices]
        replies = Replies(engine, queries, echo=body.echo)
        return await answer(request, body, replies, Writer(body.model, chat=False, vocabulary=engine.model.vocabulary, each=body.n or 1))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        models.check(body.model)
        replies = await chat_replies(engine, request, body)
        return await answer(request, body, replies, Writer(body.model, chat=True, vocabulary=engine.model.vocabulary, each=body.n or 1))


async def choices_of(engine: Engine, body: AnyRequest, stop: tuple[str, ...] = ()) -> list[Sampling]:
    """How the replies that a body asks for are chosen; ApiError where that is not to be had."""
    body.check(logits=engine.model.logits)
    grammar, name = body.grammar()
    if grammar:
        try:
            await asyncio.to_thread(engine.model.check_grammar, grammar)  # a large vocabulary is not read in a moment
        except Exception as error:
            found = as_api_error(error)
            raise ApiError(found.status, found.message, param=name) from None
    if any(int(token) >= engine.model.lowered.info.vocab for token in body.logit_bias or {}):
        raise ApiError(400, f"logit_bias: the vocabulary has {engine.model.lowered.info.vocab} tokens", param="logit_bias")
    return body.choices(stop, grammar)


async def chat_replies(engine: Engine, request: Request, body: ChatRequest) -> Replies:
    """Those to a chat; ApiError before anything is asked."""
    maker, offered = engine.model.chat, body.offered
    if offered and not maker.tools:
        raise ApiError(400, "tools: the model's chat template knows of none", param="tools")
    with as_api_errors():
        choices = await choices_of(engine, body, maker.stop)
        prompt = await while_there(request, maker.prompt([message.plain() for message in body.messages], offered))
    count = body.max_completion_tokens or body.max_tokens or engine.limits.new_tokens
    more: dict[str, Any] = {"special_tokens": maker.plain, "logprobs": body.alternatives}
    queries = [Query(prompt, count, choice, body.ignore_eos, **more) for choice in choices]
    return Replies(engine, queries, shown=maker.shown, tools=bool(offered))


def _as_it_is(text: str, first: bool) -> str:
    """A completion's pieces are shown as they come."""
    return text


@dataclass(repr=False)
class Replies:
    """The replies to one request: `pieces` of each as they come. With `tools` a reply comes in one piece, its calls read."""

    engine: Engine
    queries: Sequence[Query]
    echo: bool = False
    tools: bool = False
    shown: Callable[..., str] = field(default=_as_it_is, repr=False)
    answers: list[Answer] = field(default_factory=list)

    def pieces(self) -> AsyncIterator[Piece]:
        """Of all of them side by side; what goes wrong with one of them ends all."""
        self.answers = [Answer() for _ in self.queries]
        made = [self._pieces(query, reply) for query, reply in zip(self.queries, self.answers, strict=True)]
        return together([tools.gathered(each) for each in made] if self.tools else made)

    async def _pieces(self, query: Query, reply: Answer) -> AsyncIterator[Said]:
        """Texts as they come; ids where the model has no tokenizer, with blanks between."""
        first = True
        echo = self.echo
        async with contextlib.aclosing(self.engine.stream(query, reply)) as every:  # type: ignore[type-var]
            async for token in every:
                if echo:
                    yield self._echoed(query, reply)
                    echo = False
                yield self._said(token, first, query)
                first = first and not token.text and token.text is not None
        if echo:
            yield self._echoed(query, reply)

    def _said(self, token: Token, first: bool, query: Query) -> Said:
        text = f"{'' if first and not self.echo else ' '}{token.id}" if token.text is None else self.shown(token.text, first=first)
        return Said(text, None if query.logprobs is None or token.score is None else (token.score,))

    def _echoed(self, query: Query, reply: Answer) -> Said:
        """The prompt, which the reply begins with."""
        tokenizer, text = self.engine.model.tokenizer, query.prompt
        if not isinstance(text, str):
            text = " ".join(map(str, text)) if tokenizer is None else tokenizer.decode(text, skip_special_tokens=False)
        return Said(text, reply.prompt_scores if query.score_prompt else None)


async def answer(request: Request, body: AnyRequest, replies: Replies, writer: Writer) -> Response:
    """The replies, whole or as a stream."""
    merged = replies.pieces()
    with as_api_errors():
        if not body.stream:
            return JSONResponse(writer.whole(await while_there(request, whole(merged, len(replies.queries))), replies.answers))
        # the status is decided by the first token: until it has come, a refusal still is one
        first = await while_there(request, anext(merged))
    options = body.stream_options
    usage = bool(options and options.include_usage)
    return EventSourceResponse(_events(first, merged, replies.answers, writer, usage), ping=PING_S, sep="\n")


@contextlib.contextmanager
def as_api_errors() -> Iterator[None]:
    """What goes wrong within is told to the caller, if there is one left."""
    try:
        yield
    except CallerGone:
        raise
    except Exception as error:
        raise as_api_error(error) from error


async def whole(pieces: AsyncIterator[Piece], count: int) -> list[Said]:
    """Each reply in one piece."""
    texts: list[list[Said]] = [[] for _ in range(count)]
    async for index, said in pieces:
        texts[index] += [] if said is None else [said]
    return [tools.joined(said) for said in texts]


async def _events(
    first: Piece, pieces: AsyncIterator[Piece], replies: Sequence[Answer], writer: Writer, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; an error in the middle is an event too."""
    called = set[int]()

    def event(index: int, said: Said | None) -> dict[str, Any] | None:
        if said is None:
            return {"data": writer.piece(index=index, finish="tool_calls" if index in called else replies[index].finish_reason)}
        called.update([index] if said.calls else [])
        return {"data": writer.piece(said, index=index)} if said.text or said.scores or said.calls else None

    async with contextlib.aclosing(pieces) as rest:  # type: ignore[type-var]
        for index in range(len(replies)) if writer.chat else ():
            yield {"data": writer.piece(index=index, first=True)}
        try:
            if (made := event(*first)) is not None:
                yield made
            async for piece in rest:
                if (made := event(*piece)) is not None:
                    yield made
        except Exception as error:
            yield {"data": json.dumps(as_api_error(error).body, ensure_ascii=False)}
            return
        if usage:
            yield {"data": writer.last(*replies)}
        yield {"data": "[DONE]"}
