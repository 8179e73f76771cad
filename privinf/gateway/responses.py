"""The Responses interface in its simplest form: a text or messages in, one message of text out, whole or as a stream. Nothing is stored."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr
from sse_starlette.sse import EventSourceResponse

from privinf.gateway.asked import ChatRequest, Count, Message, Share, Temperature, Text
from privinf.gateway.completions import PING_S, Replies, as_api_errors, chat_replies, whole
from privinf.gateway.engine import Engine
from privinf.gateway.merged import Piece
from privinf.gateway.models import Models
from privinf.gateway.waits import while_there
from privinf.gateway.wire import ApiError, as_api_error
from privinf.gateway.writer import Counts


class InputPart(BaseModel):
    """One piece of an item's content; text is the only kind."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputItem(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    type: Literal["message"] = "message"
    role: Annotated[StrictStr, Field(max_length=100)]
    content: Text | list[InputPart]

    def plain(self) -> Message:
        """As a chat has it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=text)


class ResponsesRequest(BaseModel):
    """POST /v1/responses. Fields that nobody here knows are left alone, unless they would change the reply."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    model: StrictStr
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=10_000)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    text: dict[str, Any] | None = None
    metadata: Annotated[dict[StrictStr, StrictStr], Field(max_length=16)] | None = None
    stream: StrictBool | None = None

    def chat(self) -> ChatRequest:
        """The same as a chat; ApiError for what is not to be had here."""
        without: dict[str, Any] = {"tools": [], "previous_response_id": "", "conversation": None, "background": False, "include": []}
        without |= {"prompt": None, "top_logprobs": 0}
        for name, value in (self.model_extra or {}).items():
            if name in without and value is not None and value != without[name]:
                raise ApiError(400, f"{name} is not supported here", param=name)
        messages = [Message(role="user", content=self.input)] if isinstance(self.input, str) else [each.plain() for each in self.input]
        before = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        made: dict[str, Any] = {"max_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p}
        made |= {
            name: (self.model_extra or {}).get(name) for name in ("seed", "top_k", "stop", "ignore_eos") if name in (self.model_extra or {})
        }
        form = (self.text or {}).get("format")
        if isinstance(form, dict) and form.get("type") != "text":
            made["response_format"] = {"type": form.get("type"), "json_schema": form, "regex": form.get("regex")}
        try:
            return ChatRequest.model_validate({"model": self.model, "messages": [*before, *messages], **made})
        except ValueError:  # of what is not among this model's own fields
            raise ApiError(400, "text.format, seed, top_k, stop: one of them cannot be read", param="text") from None


class Document:
    """A response as it is written."""

    def __init__(self, body: ResponsesRequest) -> None:
        self._id, self.item, self._at = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}", int(time.time())
        self._body = body
        self._events = 0

    def message(self, text: str, status: str) -> dict[str, Any]:
        """The one item of its output."""
        content = [] if status == "in_progress" else [part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def written(self, text: str | None, reply: Counts | None = None) -> dict[str, Any]:
        """All of it, of a reply that has ended, or before there is one."""
        body, cut = self._body, reply is not None and reply.finish_reason == "length"
        status = "in_progress" if reply is None else "incomplete" if cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [] if text is None else [self.message(text, status)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature or 0.0,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if reply is None else _usage(reply),
        }

    def event(self, kind: str, **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        self._events += 1
        return {"event": kind, "data": json.dumps({"type": kind, "sequence_number": self._events - 1, **more}, ensure_ascii=False)}


def part(text: str) -> dict[str, Any]:
    """The text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(reply: Counts) -> dict[str, Any]:
    counts = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.tokens, "total_tokens": reply.prompt_tokens + reply.tokens}
    details = {"cached_tokens": reply.cached_tokens}
    return {**counts, "input_tokens_details": details, "output_tokens_details": {"reasoning_tokens": 0}}


def add_responses(app: FastAPI, engine: Engine, models: Models) -> None:
    """Its path."""

    @app.post("/v1/responses", response_model=None)
    async def respond(request: Request, body: ResponsesRequest) -> Response:
        models.check(body.model)
        replies, document = await chat_replies(engine, request, body.chat()), Document(body)
        pieces = replies.pieces()
        with as_api_errors():
            if not body.stream:
                (said,) = await while_there(request, whole(pieces, 1))
                return JSONResponse(document.written(said.text, replies.answers[0]))
            first = await while_there(request, anext(pieces))
        return EventSourceResponse(_events(first, pieces, replies, document), ping=PING_S, sep="\n")


async def _events(first: Piece, pieces: AsyncIterator[Piece], replies: Replies, document: Document) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; an error in the middle is one too."""
    place = {"item_id": document.item, "output_index": 0, "content_index": 0}
    yield document.event("response.created", response=document.written(None))
    yield document.event("response.in_progress", response=document.written(None))
    yield document.event("response.output_item.added", output_index=0, item=document.message("", "in_progress"))
    yield document.event("response.content_part.added", **place, part=part(""))
    text = ""
    async with contextlib.aclosing(pieces) as rest:  # type: ignore[type-var]
        try:
            piece: Piece | None = first
            while piece is not None:
                if piece[1] is not None and piece[1].text:
                    text += piece[1].text
                    yield document.event("response.output_text.delta", **place, delta=piece[1].text, logprobs=[])
                piece = await anext(rest, None)
        except Exception as error:
            told = as_api_error(error).body["error"]
            yield document.event("error", code=told["code"], message=told["message"], param=told["param"])
            return
    whole = document.written(text, replies.answers[0])
    yield document.event("response.output_text.done", **place, text=text, logprobs=[])
    yield document.event("response.content_part.done", **place, part=part(text))
    yield document.event("response.output_item.done", output_index=0, item=whole["output"][0])
    yield document.event(f"response.{whole['status']}", response=whole)
