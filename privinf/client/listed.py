"""A list of prompts, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from privinf.client.text import Token


class Placed(NamedTuple):
    """A new token, and to which of the prompts, counted from 0."""

    which: int
    token: Token


def several(prompt: object, ids: object) -> bool:
    """Whether a list of prompts was given, or of their ids, and not one."""
    return isinstance(prompt, list | tuple) or (isinstance(ids, Sequence) and len(ids) > 0 and isinstance(ids[0], Sequence))
