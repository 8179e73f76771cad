"""Calls of tools in a reply, as templates have models write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

A reply that is such an object and nothing else is a call too.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from privinf.gateway.writer import Said

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def joined(said: Sequence[Said]) -> Said:
    """Pieces of a reply as one."""
    scores = [score for each in said for score in each.scores or ()]
    scored = any(each.scores is not None for each in said)
    return Said("".join(each.text for each in said), tuple(scores) if scored else None, tuple(call for each in said for call in each.calls))


async def gathered(pieces: AsyncIterator[Said]) -> AsyncIterator[Said]:
    """A reply in one piece at its end, with the calls in it: where one begins is known only then."""
    async with contextlib.aclosing(pieces) as every:  # type: ignore[type-var]
        whole = joined([each async for each in every])
    text, calls = read_calls(whole.text)
    yield Said(text, whole.scores, calls)


def read_calls(text: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """What of a reply is text, and the calls in it in OpenAI's form; what is no call stays text."""
    places = [(found.span(), _call(found[1])) for found in _CALL.finditer(text)]
    places = [(span, call) for span, call in places if call is not None]
    if not places:
        alone = _call(text.strip())
        return (text, ()) if alone is None else ("", (alone,))
    rest, at = [], 0
    for (start, end), _ in places:
        rest.append(text[at:start])
        at = end
    return "".join([*rest, text[at:]]).strip(), tuple(call for _, call in places if call is not None)


def _call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(name := found.get("name"), str):
        return None
    given = found.get("arguments", found.get("parameters"))
    if not isinstance(given, dict | str):
        return None
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}
