"""What is computed from public sizes, kept for its next use within a bound of bytes: some of those sizes come from peers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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
