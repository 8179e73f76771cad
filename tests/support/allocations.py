"""What a stretch of code allocates at a time, in bytes: torch's tensors by its operators, numpy's arrays by tracemalloc."""

from __future__ import annotations

import functools
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves both untyped
    """Counts each storage that an operator returns for as long as a tensor has it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0
        self.largest = self.now = 0
        self._tensors: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if not self._tensors[place]:
            self.now += size
            self.largest = max(self.largest, self.now)
        self._tensors[place] += 1
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._tensors[place] -= 1
        if not self._tensors[place]:
            self.now -= size


@functools.cache
def _warm() -> None:
    """What torch and this imports at its first use."""
    with Allocations():
        one = torch.ones(2, dtype=torch.int64)
        one.mul(one).add_(1).scatter_(-1, one & 1, one)


@contextmanager
def watched() -> Iterator[Callable[[], int]]:
    """Within it the bytes that were held at a time so far, at most, of what was allocated within it."""
    _warm()
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start(1)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with torch.inference_mode(False), Allocations() as found:
            yield lambda: found.largest + tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
