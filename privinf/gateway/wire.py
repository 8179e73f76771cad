"""The OpenAI-compatible forms: requests as they are read, replies and errors as they are written."""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from privinf.client.sampling import MAX_TEMPERATURE, Sampling
from protocols.errors import KINDS, Code, PrivinfError, kind_of

if TYPE_CHECKING:  # a job of many prompts speaks these forms without a web server
    from fastapi.responses import JSONResponse

RETRY_S = 5
"""After which a caller may ask again where a peer could not be reached."""
MAX_CHOICES = 128
"""Replies to one request."""
COMPLETION_TOKENS = 16
"""The longest completion where the caller names no length; a chat's reply then is as long as the gateway allows."""

CHOICES = {
    "prompt": "give a text or a list of token ids, or a list of such prompts",
    "content": "give a text, or a list of parts of the type text",
    "stop": "give a text, or a list of texts",
}
"""Of fields that may be of several kinds."""

Text = Annotated[StrictStr, Field(max_length=1 << 20)]
Ids = Annotated[list[StrictInt], Field(max_length=1 << 20)]
Count = Annotated[StrictInt, Field(ge=1)]
Temperature = Annotated[StrictFloat, Field(ge=0, le=MAX_TEMPERATURE)]
Share = Annotated[StrictFloat, Field(gt=0, le=1)]


class ApiError(Exception):
    """What a caller is told, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after, self.close = status, message, retry_after, close
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """As an answer over HTTP, with the headers that its status wants."""
        from fastapi.responses import JSONResponse

        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return JSONResponse(self.body, self.status, headers)


class Verdict(NamedTuple):
    """How a caller is told of a failure: the HTTP status, OpenAI's code, and whether to ask again, after RETRY_S if nobody knows when."""

    status: int
    code: str | None
    again: bool = False
    param: str | None = None
    close: bool = False


_BAD, _BUSY, _GONE = Verdict(400, None), Verdict(429, "rate_limit_exceeded", again=True), Verdict(503, "peer_unreachable", again=True)
_REFUSED, _FAILED = Verdict(502, "peer_refused"), Verdict(502, "peer_failed")
VERDICTS = {
    Code.OTHER: _FAILED,
    Code.CONFIG: _BAD,
    Code.TOO_LONG: Verdict(400, "context_length_exceeded"),
    Code.HANDSHAKE: _FAILED,
    Code.NO_LOGITS: Verdict(400, None, param="temperature"),
    Code.NOT_LISTED: _FAILED,
    Code.SILENT: _FAILED,
    Code.REFUSED: _REFUSED,
    Code.FULL: _BUSY,
    Code.CLIENT_FULL: _BUSY,
    Code.SERVER_FULL: _BUSY,
    Code.CROWDED: _REFUSED,
    Code.REVOKED: _REFUSED,
    Code.REQUESTS: _REFUSED,
    Code.TOKENS: _REFUSED,
    Code.BYTES: _REFUSED,
    Code.BUDGET: _BUSY,
    Code.SET_UPS: _BUSY,
    Code.DISK: _REFUSED,
    Code.TRANSPORT: _FAILED,
    Code.OPENING: _FAILED,
    Code.INTERNAL: _FAILED,
    Code.IDLE: _FAILED,
    Code.ABSENT: _GONE,
    Code.STOPPING: _GONE,
    Code.DESYNC: _FAILED,
    Code.RANGE: _FAILED,
    Code.CORRELATION: _FAILED,
    Code.UNSUPPORTED: _FAILED,
    Code.TEMPLATE: Verdict(500, "chat_template_failed"),
    Code.GATEWAY_STOPPING: Verdict(503, "stopping", again=True, close=True),
    Code.DEFECT: _FAILED,
}


def as_api_error(error: BaseException) -> ApiError:
    """An error of the protocol as a caller is told of it."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, PrivinfError):
        return ApiError(500, "internal error in the gateway", code="internal_error")
    # a peer may say any code: where that makes another class of error than it does here, it is the class that counts
    code = error.code if kind_of(error.code, error.heard) is KINDS[error.code] else type(error).code
    verdict = VERDICTS[code]
    message = f"{error.message}, so the temperature must be 0" if code is Code.NO_LOGITS else str(error)
    again = max(1, error.again(RETRY_S) or RETRY_S) if verdict.again else 0
    return ApiError(verdict.status, message, param=verdict.param, code=verdict.code, retry_after=again, close=verdict.close)


def malformed_body(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found in a body, for a caller: the first field that is wrong, and why."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON")
    place = [str(part) for part in first["loc"][1:]]
    if not place:
        return ApiError(400, "the body is no JSON object; send one, as application/json")
    # what follows a union's field is the name of one of its kinds, and what each of them is not says little
    param = ".".join(itertools.takewhile(lambda part: part.isidentifier() or part.isdigit(), place))
    sizes = [error["msg"] for error in errors if str(error["type"]).endswith(("too_long", "too_short"))]
    why = sizes[0] if sizes else CHOICES.get(param.rpartition(".")[2], first["msg"])
    return ApiError(400, f"{param}: {why}", param=param)


class StreamOptions(BaseModel):
    """What a caller wants of a stream besides its pieces."""

    include_usage: StrictBool = False


class _Request(BaseModel):
    """What completions and chats have in common. Fields that nobody here knows are left alone, unless they would change the reply."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    model: StrictStr
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool = False
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """ApiError for what would change the reply and is not to be had here."""
        without = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0, "best_of": 1}
        without |= {"echo": False, "suffix": "", "tools": [], "functions": [], "tool_choice": "none", "response_format": {"type": "text"}}
        without |= {"modalities": ["text"], "min_p": 0, "min_tokens": 0, "repetition_penalty": 1, "use_beam_search": False}
        for name, value in (self.model_extra or {}).items():
            if name in without and value is not None and value != without[name] and not (name == "logprobs" and value is False):
                raise ApiError(400, f"{name} is not supported here", param=name)

    def choices(self, stop: tuple[str, ...] = ()) -> list[Sampling]:
        """How each of the n replies to a prompt is chosen: with a seed the first as it alone would be, each from one of its own."""
        return [self.sampling(stop, number) for number in range(self.n or 1)]

    def sampling(self, stop: tuple[str, ...] = (), number: int = 0) -> Sampling:
        """Without a temperature greedy: the server then reveals nothing but the token."""
        own = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        temperature = self.temperature or 0.0
        choice: dict[str, Any] = {}
        if temperature:
            choice = {"top_k": self.top_k or 0, "top_p": 1.0 if self.top_p is None else self.top_p}
            choice["seed"] = None if self.seed is None else (self.seed + number) % (1 << 64)
        return Sampling(temperature, stop=(*own, *stop), stop_ids=tuple(self.stop_token_ids or ()), **choice)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, as texts or as ids."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]  # type: ignore[return-value]

    @property
    def single(self) -> str | list[int]:
        """The one prompt; ApiError where more than one reply is asked for."""
        if self.n not in (None, 1) or len(self.prompts) > 1:
            raise ApiError(400, "one reply to one prompt at a time here: n must be 1", param="n" if self.n not in (None, 1) else "prompt")
        return self.prompts[0]


class TextPart(BaseModel):
    """One piece of a message's content; text is the only kind."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    role: Annotated[StrictStr, Field(max_length=100)]
    content: Text | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """As templates read it: its role, and its text as one string."""
        parts = self.content if isinstance(self.content, list) else []
        return {"role": self.role, "content": self.content if isinstance(self.content, str) else "".join(part.text for part in parts)}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None


class Counts(Protocol):
    """What a document says of a reply that has ended."""

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt."""

    @property
    def cached_tokens(self) -> int:
        """Of them, those that no pass had to take in again."""

    @property
    def tokens(self) -> int:
        """New ones."""

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`."""


class Writer:
    """The documents of one reply, as a completion or as a chat."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], replies: Sequence[Counts]) -> dict[str, Any]:
        """The replies in one piece, as choices in their order."""
        choices = []
        for index, (text, reply) in enumerate(zip(texts, replies, strict=True)):
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reply.finish_reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": usage(*replies)}

    def piece(self, text: str | None = None, *, index: int = 0, first: bool = False, finish: str | None = None) -> str:
        """One event of a stream, of the choice of this index."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {} if text is None else {"content": text}
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text or ""}
        return self._event([{"index": index, **said, "logprobs": None, "finish_reason": finish}])

    def last(self, *replies: Counts) -> str:
        """The event with the usage, where it was asked for."""
        return self._event([], usage=usage(*replies))

    def _event(self, choices: list[Any], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return json.dumps({**self._base, "object": kind, "choices": choices, **more}, ensure_ascii=False)


def usage(*replies: Counts) -> dict[str, Any]:
    """Tokens of prompts and replies; `cached_tokens`: those that a kept conversation had. A prompt counts for each reply to it."""
    prompts, tokens = sum(reply.prompt_tokens for reply in replies), sum(reply.tokens for reply in replies)
    counts = {"prompt_tokens": prompts, "completion_tokens": tokens, "total_tokens": prompts + tokens}
    return {**counts, "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in replies)}}
