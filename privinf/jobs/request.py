"""One request of a job: a line of the OpenAI batch form, or a bare prompt, and what it is called."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from privinf.client.sampling import Sampling
from privinf.gateway.asked import CompletionRequest
from privinf.gateway.wire import ApiError, as_api_error
from protocols.errors import ConfigError

MOST_LINE = 4 << 20
"""Bytes of a line: a body's prompt has 2^20 characters at most."""
MOST_ID = 512
URL = "/v1/completions"
CHOICE = {"temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "frequency_penalty", "presence_penalty", "logit_bias"}
CHOICE |= {"response_format", "guided_regex", "guided_json", "guided_choice"}
"""What a line says of the choice of tokens: then the options say nothing of it."""


@dataclass(frozen=True, repr=False)
class Defaults:
    """What a line that does not say has: the number of new tokens, and the choice among them."""

    max_new_tokens: int
    sampling: Sampling
    ignore_eos: bool = False


@dataclass(frozen=True, repr=False)
class Request:
    """A line that is one: its name, a digest that ties a reply to it, and its body."""

    custom_id: str
    id: str
    body: dict[str, Any]

    @staticmethod
    def read(number: int, line: str, *, text: bool = False) -> Request:
        """Line `number`, from 1 on; a plain prompt where `text`. ConfigError for what is none, without what it says."""
        if text:
            return Request(str(number), _digest(str(number), line), {"prompt": line})
        try:
            found = json.loads(line)
        except ValueError:
            raise _no_request(number, "is no JSON") from None
        except RecursionError:
            raise _no_request(number, "is nested too deeply") from None
        if not isinstance(found, dict):
            raise _no_request(number, "is no JSON object")
        name, body = found.get("custom_id", str(number)), found.get("body", found)
        if not isinstance(name, str) or not 0 < len(name) <= MOST_ID or not _writable(name):
            raise _no_request(number, f"has a custom_id that is no text of 1 to {MOST_ID} characters")
        if not isinstance(body, dict) or "prompt" not in body:
            raise _no_request(number, "has no prompt")
        if found.get("url", URL) != URL or found.get("method", "POST") != "POST":
            raise _no_request(number, f"asks for something else than POST {URL}")
        return Request(name, _digest(name, line), {key: value for key, value in body.items() if key != "custom_id"})

    def wanted(self, defaults: Defaults, *, logits: bool = True) -> tuple[str | list[int], int, Sampling, bool]:
        """The prompt, the most new tokens, the choice, and whether to go on after the end token.

        ApiError for a body that is none, and for one that takes `logits` where the server does not give them.
        """
        try:
            body = CompletionRequest.model_validate({"model": "", **self.body})
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"][:1])
            raise ApiError(400, f"{where}: {first['msg']}", param=where) from None
        body.check(logits=logits)
        prompt, most, ignore_eos = body.single, body.max_tokens or defaults.max_new_tokens, body.ignore_eos or defaults.ignore_eos
        if not body.model_fields_set & CHOICE:
            return prompt, most, defaults.sampling, ignore_eos
        try:
            return prompt, most, body.sampling(grammar=body.grammar()[0]), ignore_eos
        except ConfigError as error:
            raise as_api_error(error) from None


def _writable(text: str) -> bool:
    """Whether it can stand in a file: halves of surrogate pairs, which JSON can spell, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(name: str, line: str) -> str:
    return "batch_req_" + hashlib.sha256(f"{len(name)} {name}{line}".encode()).hexdigest()[:32]


def _no_request(number: int, what: str) -> ConfigError:
    return ConfigError(f"line {number} {what}", remedy='a line is an OpenAI batch request, or {"prompt": "..."}')
