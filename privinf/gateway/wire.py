"""Errors in OpenAI's form, and which failure is told how."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from protocols.errors import KINDS, Code, PrivinfError, kind_of

if TYPE_CHECKING:  # a job of many prompts speaks these forms without a web server
    from fastapi.responses import JSONResponse

RETRY_S = 5
"""After which a caller may ask again where a peer could not be reached."""
CHOICES = {
    "prompt": "give a text or a list of token ids, or a list of such prompts",
    "content": "give a text, or a list of parts of the type text",
    "stop": "give a text, or a list of texts",
}
"""Of fields that may be of several kinds."""


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
    Code.NO_LOGITS: Verdict(400, "no_logits", param="temperature"),
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
