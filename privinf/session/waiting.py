"""What is said while a peer cannot be reached."""

from __future__ import annotations

import math
from collections.abc import Callable

from privinf.transport.listener import Waiting


def line_of(reason: str, left: float) -> str:
    """`connection refused at localhost:7000, trying again, 9 s left`"""
    return f"{reason}, {max(0, math.ceil(left))} s left"


def once_for_each_reason(say: Callable[[str], None]) -> Waiting:
    """Says why a peer cannot be reached, and says it again when that changes."""
    last = ""

    def told(reason: str, left: float) -> None:
        nonlocal last
        if reason != last:
            last = reason
            say(line_of(reason, left))

    return told
