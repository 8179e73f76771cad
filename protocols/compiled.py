"""Kernels compiled by Numba: kept on the disk where that can be written, else compiled anew in each process.

A kernel has a plain twin in the tests, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled when it is first called, without the interpreter's lock while it runs."""
    try:
        made: Any = numba.njit(cache=True, nogil=True, boundscheck=False)(function)
    except RuntimeError:  # nowhere to keep it
        made = numba.njit(nogil=True, boundscheck=False)(function)
    return cast(F, made)
