"""Memory that ended sessions have freed goes back to the system.

The C library keeps what a thread has freed for threads to come, by arenas of which a process has several dozen; each session has a
thread of its own, so that without this a party's resident memory grows over many sessions before it settles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library
        return None
    return found


_TRIM = _trim()


def give_back() -> None:
    """Takes a few milliseconds; does nothing where the C library is not glibc."""
    if _TRIM is not None:
        _TRIM(0)
