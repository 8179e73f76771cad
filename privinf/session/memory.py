"""Memory that ended sessions have freed goes back to the system.

glibc keeps what a thread has freed for threads to come, in arenas of which a process may have eight for each core; each session has a
thread of its own, so that without this a party's resident memory grows over many sessions before it settles. With another C library
nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

M_ARENA_MAX = -8  # <malloc.h>
RARELY, YOUNG = 400_000, 20_000
"""New objects after which Python looks for cycles by itself, and after which it does when a query is over."""


def _of_libc(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):
        return None
    return found


_MALLOPT, _TRIM = _of_libc("mallopt"), _of_libc("malloc_trim")


def few_arenas() -> None:
    """One for each core from now on; for processes that are services and nothing else, before their threads start."""
    if _MALLOPT is not None and _TRIM is not None:
        _MALLOPT(M_ARENA_MAX, max(2, os.cpu_count() or 1))


def rare_collections() -> None:
    """Python looks for cycles less often from now on; for such processes too.

    A pass that is written down keeps some ten thousand objects, none in a cycle. As often as Python does by default, looking through them
    and through all that libraries hold took a third of a server's time in its first replies. What a session leaves is in no cycle. So
    within a reply nobody looks: `look_through` does once it is over.
    """
    gc.set_threshold(RARELY, 20, 50)


def look_through() -> None:
    """After a query: for cycles among what is new, if that is much."""
    if gc.get_count()[0] > YOUNG:
        gc.collect(0)


def give_back() -> None:
    """After a session: takes some milliseconds."""
    look_through()
    if _TRIM is not None:
        _TRIM(0)
