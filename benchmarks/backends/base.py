"""What every backend offers to a scenario."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from torch import Tensor

from benchmarks.networks import Network
from benchmarks.schema import Predicted, Row, Socket


@dataclass
class Sample:
    """One pass: the client's seconds by phase, and what came out: logits (V,) where they were asked for, or a token."""

    seconds: dict[str, float]
    logits: Tensor | None = None
    token: int | None = None


@dataclass
class Counted:
    """What was counted once a backend has been closed: the rows of one pass, the sockets' own counters, each party's peak memory."""

    rows: list[Row] = field(default_factory=list)
    sockets: list[Socket] = field(default_factory=list)
    predicted: list[Predicted] = field(default_factory=list)
    figures: dict[str, tuple[float, ...]] = field(default_factory=dict)  # the samples of each; their mean is the figure
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Backend(Protocol):
    """A context manager around the processes of a backend."""

    name: str
    trust: str

    def __init__(self, network: Network, seq: int, **options: Any) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    @staticmethod
    def needs(parameters: int, seq: int, vocab: int) -> int:
        """Bytes of memory, roughly, for the check before the start."""

    def once(self, ids: list[int], *, logits: bool = False) -> Sample:
        """One pass from ids to the next token (or, where asked for, the last position's logits)."""

    def counted(self) -> Counted:
        """After the end of the context."""
