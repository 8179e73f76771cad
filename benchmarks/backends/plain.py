"""Float PyTorch in this process, one thread: the floor of the seconds, and what errors are measured against."""

from __future__ import annotations

import time
from typing import Any, Self

import torch

from benchmarks.backends.base import Counted, Sample
from benchmarks.networks import Network


class PlainBackend:
    """No privacy, no bytes."""

    name = "plain"
    trust = "none: one process sees everything"

    def __init__(self, network: Network, seq: int, **options: Any) -> None:
        self.network = network

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)

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
