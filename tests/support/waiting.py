"""Waiting in tests: for what happens, and no shorter than a busy machine may need. Nothing but a hang takes as long as these."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")

PATIENCE = 90.0


def wait_for(found: Callable[[], Answer], seconds: float = PATIENCE, about: Callable[[], str] = lambda: "") -> Answer:
    """Asks again and again until the answer is true."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s; {about()}"
        time.sleep(0.02)
    return answer
