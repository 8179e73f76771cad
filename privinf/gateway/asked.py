"""What callers ask for: the bodies of completions and chats, and which of them a server must grant logits for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from privinf.client.sampling import MAX_BIAS, MAX_PENALTY, MAX_TEMPERATURE, Sampling
from privinf.client.scores import MOST
from privinf.gateway.wire import ApiError

MAX_CHOICES = 128
"""Replies to one request, and texts of which a reply is to be one."""
MAX_TOOLS = 128
Text = Annotated[StrictStr, Field(max_length=1 << 20)]
Ids = Annotated[list[StrictInt], Field(max_length=1 << 20)]
Count = Annotated[StrictInt, Field(ge=1)]
Temperature = Annotated[StrictFloat, Field(ge=0, le=MAX_TEMPERATURE)]
Share = Annotated[StrictFloat, Field(gt=0, le=1)]
Penalty = Annotated[StrictFloat, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Bias = Annotated[StrictFloat, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Tops = Annotated[StrictInt, Field(ge=0, le=MOST)]


class StreamOptions(BaseModel):
    """What a caller wants of a stream besides its pieces."""

    include_usage: StrictBool = False


class JsonSchema(BaseModel):
    """A schema as OpenAI's `response_format` has it: under a name, which says nothing here."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True, populate_by_name=True)

    form: dict[str, Any] | StrictBool = Field(default=True, alias="schema")


class ResponseFormat(BaseModel):
    """Of which form a reply is: any text, a JSON object, a value for a schema, or what an expression matches."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: StrictStr | None = None


class AnyRequest(BaseModel):
    """What all requests for replies have in common. Fields that nobody here knows are left alone, unless they would change the reply.

    Its attributes are the fields of that interface.
    """

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    model: StrictStr
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool = False
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    guided_regex: StrictStr | None = None
    guided_json: dict[str, Any] | StrictStr | None = None
    guided_choice: Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    def check(self, *, logits: bool = True) -> None:
        """ApiError for what would change the reply and is not to be had here: at all, or where the server grants no `logits`."""
        without: dict[str, Any] = {"best_of": 1, "suffix": "", "functions": [], "modalities": ["text"], "min_p": 0, "min_tokens": 0}
        without |= {"repetition_penalty": 1, "use_beam_search": False, "guided_grammar": "", "structured_outputs": {}}
        without |= {"tools": [], "tool_choice": "none", "logprobs": False, "top_logprobs": 0, "echo": False}  # of requests that have none
        for name, value in (self.model_extra or {}).items():
            if name in without and value is not None and value != without[name]:
                raise ApiError(400, f"{name} is not supported here", param=name)
        if not logits and (name := next(self._takes_logits(), "")):
            message = f"{name} takes logits, and this server grants the greedy choice alone (serve --allow-logits grants more)"
            raise ApiError(400, message, param=name, code="no_logits")

    def _takes_logits(self) -> Iterator[str]:
        """The fields for which the server must grant logits; of a temperature its own refusal tells."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias", "guided_regex", "guided_json", "guided_choice"):
            if getattr(self, name):
                yield name
        if self.response_format is not None and self.response_format.type != "text":
            yield "response_format"

    def grammar(self) -> tuple[str, str]:
        """The grammar of the reply's form and the field that asks for it, both empty where none does; ApiError where it is none."""
        from privinf.client.grammar import of_regex, of_schema

        form, found = self.response_format, []
        if form is not None and form.type != "text":
            if (form.type == "json_schema" and form.json_schema is None) or (form.type == "regex" and form.regex is None):
                raise ApiError(400, f"response_format.{form.type}: give one", param="response_format")
            schema: Any = {"type": "object"} if form.json_schema is None else form.json_schema.form
            found.append(("response_format", lambda: of_regex(form.regex or "") if form.type == "regex" else of_schema(schema)))
        if self.guided_regex:
            found.append(("guided_regex", lambda: of_regex(str(self.guided_regex))))
        if self.guided_json:
            found.append(("guided_json", lambda: of_schema(_json(self.guided_json))))
        if self.guided_choice:
            found.append(("guided_choice", lambda: of_regex("|".join(map(re.escape, self.guided_choice or ())))))
        if len(found) > 1:
            raise ApiError(400, f"{found[1][0]}: a reply has one form, and {found[0][0]} says another", param=found[1][0])
        return (found[0][1](), found[0][0]) if found else ("", "")

    def choices(self, stop: tuple[str, ...] = (), grammar: str = "") -> list[Sampling]:
        """How each of the n replies to a prompt is chosen: with a seed the first as it alone would be, each from one of its own."""
        return [self.sampling(stop, number, grammar) for number in range(self.n or 1)]

    def sampling(self, stop: tuple[str, ...] = (), number: int = 0, grammar: str = "") -> Sampling:
        """Without a temperature greedy: the server then reveals nothing but the token, unless something else takes logits."""
        own = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        temperature = self.temperature or 0.0
        choice: dict[str, Any] = {}
        if temperature:
            choice = {"top_k": self.top_k or 0, "top_p": 1.0 if self.top_p is None else self.top_p}
            choice["seed"] = None if self.seed is None else (self.seed + number) % (1 << 64)
        choice |= {"frequency_penalty": self.frequency_penalty or 0.0, "presence_penalty": self.presence_penalty or 0.0}
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        ends = tuple(self.stop_token_ids or ())
        return Sampling(temperature, stop=(*own, *stop), stop_ids=ends, bias=bias, grammar=grammar, **choice)


def _json(schema: dict[str, Any] | str | None) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise ApiError(400, "guided_json: the schema is no JSON", param="guided_json") from None


class CompletionRequest(AnyRequest):
    """POST /v1/completions."""

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Tops | StrictBool | None = None
    echo: StrictBool = False

    def check(self, *, logits: bool = True) -> None:
        super().check(logits=logits)
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: nothing is asked for; give 1 or more, or echo", param="max_tokens")
        if self.logprobs is True:
            raise ApiError(400, f"logprobs: give the number of alternatives, 0 to {MOST}", param="logprobs")

    def _takes_logits(self) -> Iterator[str]:
        if self.alternatives is not None:
            yield "logprobs"
        yield from super()._takes_logits()

    @property
    def alternatives(self) -> int | None:
        """Of how many tokens there are log-probabilities beside each one's own; None: not even of that."""
        return None if self.logprobs is None or isinstance(self.logprobs, bool) else self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All of them, as texts or as ids."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt
        return [self.prompt]  # type: ignore[return-value]

    @property
    def single(self) -> str | list[int]:
        """The one prompt; ApiError where more is asked for than one reply without log-probabilities."""
        if self.n not in (None, 1) or len(self.prompts) > 1:
            raise ApiError(400, "one reply to one prompt at a time here: n must be 1", param="n" if self.n not in (None, 1) else "prompt")
        if self.alternatives is not None or self.echo:
            name = "echo" if self.echo else "logprobs"
            raise ApiError(400, f"{name} is not supported here", param=name)
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
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None

    def plain(self) -> dict[str, Any]:
        """As templates read it: its role, its text as one string, and what it says of tools, arguments as objects."""
        parts = self.content if isinstance(self.content, list) else []
        found: dict[str, Any] = {"role": self.role}
        found["content"] = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        found |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        return found | ({"tool_calls": [_read_call(call) for call in self.tool_calls]} if self.tool_calls else {})


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call that the model has made, with its arguments as an object, which is what templates write down."""
    function = call.get("function")
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}} if isinstance(function, dict) else call
    except (KeyError, TypeError, ValueError, RecursionError):
        return call


class Function(BaseModel):
    """What a tool is to the model."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    name: Annotated[StrictStr, Field(max_length=100)]


class Tool(BaseModel):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class ChatRequest(AnyRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Tops | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None

    def check(self, *, logits: bool = True) -> None:
        super().check(logits=logits)
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: ask for logprobs too", param="top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, 'tool_choice: give "auto" or "none"; no tool can be made the choice here', param="tool_choice")

    def _takes_logits(self) -> Iterator[str]:
        if self.logprobs:
            yield "logprobs"
        yield from super()._takes_logits()

    @property
    def alternatives(self) -> int | None:
        """As of a completion."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools among which the model may choose."""
        return [] if self.tool_choice == "none" else [tool.model_dump() for tool in self.tools or ()]
