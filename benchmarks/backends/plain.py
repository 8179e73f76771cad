"""Float PyTorch in this process, one thread: the floor of the seconds, and what errors are measured against."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Self

import torch

from benchmarks.backends.base import Counted, Sample
from benchmarks.networks import Network


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Of torch, in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PlainBackend:
    """No privacy, no bytes."""

    name = "plain"
    trust = "none: one process sees everything"

    def __init__(self, network: Network, seq: int, **options: Any) -> None:
        self.network = network

    def __enter__(self) -> Self:
        self._thread = contextlib.ExitStack()
        self._thread.enter_context(one_thread())
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.close()

    @staticmethod
    def needs(parameters: int, seq: int, vocab: int) -> int:
        """The weights are loaded anyway."""
        return 4 * parameters

    def once(self, ids: list[int], *, logits: bool = False) -> Sample:
        """One pass."""
        began = time.perf_counter()
        out = self.network.floats(ids)
        seconds = time.perf_counter() - began
        return Sample({"online": seconds}, out if logits else None, int(out.argmax()))

    def counted(self) -> Counted:
        """Nothing crosses a socket."""
        return Counted()
