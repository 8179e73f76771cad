"""What is computed from public sizes, kept for its next use within a bound of bytes: some of those sizes come from peers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


class _Aside(threading.local):
    by: Callable[[], AbstractContextManager[None]] | None = None


_aside = _Aside()


def set_aside(by: Callable[[], AbstractContextManager[None]] | None) -> None:
    """What is around everything in this thread that is made to be kept, from now on; None: nothing any more."""
    _aside.by = by


def aside() -> AbstractContextManager[None]:
    """Around what is made to be kept: a recording of what a walk computes (`protocols.recording`) has no part of it."""
    return nullcontext() if _aside.by is None else _aside.by()


def constant(maxsize: int = 128) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keeps what a function makes of its arguments, as `lru_cache` does; for tensors, of which no recording must have a part."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize)
        @wraps(function)
        def made(*args: P.args, **kwargs: P.kwargs) -> T:
            with aside():
                return function(*args, **kwargs)

        return cast(Callable[P, T], made)

    return decorate


class Memo:
    """Results of several functions, at most so many bytes of them; those that were not used for longest go first."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._guard = threading.Lock()

    def kept(self, size: Callable[[T], int]) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """For functions of hashable arguments; `size` says the bytes of a result. What is larger than the bound is made anew each time."""

        def decorate(function: Callable[P, T]) -> Callable[P, T]:
            @wraps(function)
            def found(*args: P.args, **kwargs: P.kwargs) -> T:
                assert not kwargs, "by position"
                key = (function, args)
                with self._guard:
                    if key in self._found:
                        self._found.move_to_end(key)
                        return self._found[key][0]  # type: ignore[no-any-return]
                with aside():
                    result = function(*args, **kwargs)
                self._keep(key, result, size(result))
                return result

            return found

        return decorate

    def clear(self) -> None:
        """Forgets all of them."""
        with self._guard:
            self._found.clear()
            self.bytes = 0

    def _keep(self, key: Hashable, result: Any, size: int) -> None:
        with self._guard:
            if size > self.most or key in self._found:
                return
            self._found[key] = result, size
            self.bytes += size
            while self.bytes > self.most:
                _, (_, gone) = self._found.popitem(last=False)
                self.bytes -= gone
