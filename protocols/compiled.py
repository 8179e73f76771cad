"""Kernels compiled by Numba: kept on the disk where that can be written, else compiled anew in each process.

A kernel has a plain twin in the tests, which gives the same bits. Numba itself is imported at the first call, not with the parties.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

KEEPING = threading.Lock()
"""Held while Numba is told where to keep kernels: it reads a setting of the whole process, twice."""
F = TypeVar("F", bound=Callable[..., Any])


class _Later:
    """A kernel that nobody has called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._made = function, None

    def __call__(self, *args: Any) -> Any:
        if self._made is None:
            # those of a module call each other by name, and Numba is to find kernels there
            own = self._function.__globals__
            for name, value in list(own.items()):
                if isinstance(value, _Later):
                    own[name] = value.kernel()
        return self.kernel()(*args)

    def kernel(self) -> Any:
        """Numba's own object, made once."""
        if self._made is None:
            import numba

            try:
                with KEEPING:
                    self._made = numba.njit(cache=True, nogil=True, boundscheck=False)(self._function)
            except RuntimeError:  # nowhere to keep it
                self._made = numba.njit(nogil=True, boundscheck=False)(self._function)
        return self._made


def compiled(function: F) -> F:
    """Compiled when it is first called, without the interpreter's lock while it runs."""
    return cast(F, _Later(function))
