"""`PrivinfTensor`: the CrypTensor on which a lowered graph runs on our protocols, at one party.

A node that is given one runs its own protocol on it (`Node.run`). The same code walks the graph on shapes alone before the query
(`protocols.party`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from privinf.crypten_adapter import CrypTensor, Graph, PrivateValue
from privinf.graph.batch import Batch
from protocols.linear import Weight
from protocols.party import Party, Protocol_
from protocols.ring import BLOCK, encode
from protocols.shares import Shares


def weights_of(graph: Graph) -> dict[str, tuple[Weight, Any, str]]:
    """Every encoded matrix or diagonal: name -> (public record, node, parameter)."""
    return {weight.name: (weight, node, key) for node in graph.nodes for key, weight in node.weights().items()}


def encode_weights(graph: Graph, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """S's encoded weights by name, each in its `dtype`, on a device."""
    return {name: _encoded(node.encoded_value(key), weight, device) for name, (weight, node, key) in weights_of(graph).items()}


def _encoded(value: Tensor, weight: Weight, device: torch.device | str) -> Tensor:
    """Some rows at a time, so that no float64 of a large one is whole."""
    out = torch.empty(value.shape, dtype=weight.dtype, device=device)
    rows = max(1, BLOCK * len(value) // max(1, value.numel()))
    for at in range(0, len(value), rows):
        out[at : at + rows] = encode(value[at : at + rows].to(device), weight.frac)
    return out


class Kept(Protocol):
    """What a node keeps between tokens: one part of its state, opaque to all but the node."""

    def shape_only(self) -> Self:
        """The same without values, for a walk on shapes."""


@dataclass
class Runtime:
    """One party's walk over a graph: the party, the public records of its weights, what nodes have kept so far."""

    party: Party
    weights: dict[str, Weight]
    state: dict[str, Mapping[str, Kept]] = field(default_factory=dict)  # by node, what it declares as `state`
    offset: int = 0  # positions that have gone through
    constants: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)  # S's encoded biases and positions
    device: torch.device | str = "cpu"  # where this party computes
    fills: int = 0  # up to this length the row of a further token is filled up, so that shapes repeat: where a dealer deals
    unread: frozenset[str] = frozenset()  # nodes with state whose result nothing reads in this pass: they only take in
    every: int = 0  # in a pass with an output of every new position, and not of each sequence's last alone, how many there are
    batch: Batch | None = None  # the pass under way, or the last one, where it is over several sequences; `offset` is then none's

    @staticmethod
    def of(graph: Graph, party: Party, device: torch.device | str = "cpu", *, fills: int = 0) -> Runtime:
        """A walk that has kept nothing yet."""
        return Runtime(party, {name: weight for name, (weight, _, _) in weights_of(graph).items()}, device=device, fills=fills)

    def sketch(self, party: Party) -> Runtime:
        """A walk on shapes from the same state; what it does to the state is forgotten."""
        shapes: dict[str, Mapping[str, Kept]] = {
            node: {part: kept.shape_only() for part, kept in parts.items()} for node, parts in self.state.items()
        }
        if party.tables is None:
            party.tables = self.party.tables
        return Runtime(party, self.weights, shapes, self.offset, self.constants, self.device, self.fills, batch=self.batch)

    def windows(self, count: int, last: bool = False) -> list[tuple[int, int]]:
        """The positions of a pass's `count` rows, from and to before: once, or for each sequence of a batch; or of its last row alone."""
        if self.batch is not None:
            return self.batch.windows(last)
        return [(self.offset + count - (1 if last else count), self.offset + count)]


@CrypTensor.register_cryptensor("privinf")
class PrivinfTensor(PrivateValue):
    """Shares of a tensor at one party, or the ids that only the client knows (`ids`: (1, T), a meta tensor elsewhere)."""

    def __init__(self, runtime: Runtime, shares: Shares | None = None, ids: Tensor | None = None) -> None:
        super().__init__()
        self.runtime = runtime
        self.held = shares
        self.ids = ids

    def __repr__(self) -> str:
        return f"PrivinfTensor({self.held if self.held is not None else 'ids hidden'})"

    @property
    def shares(self) -> Shares:
        """This party's shares."""
        assert self.held is not None
        return self.held

    @property
    def party(self) -> Party:
        """Who walks."""
        return self.runtime.party

    def with_shares(self, shares: Shares) -> PrivinfTensor:
        """Another value of the same walk."""
        return PrivinfTensor(self.runtime, shares)

    def moved(self, function: Callable[[Tensor], Tensor]) -> PrivinfTensor:
        """The value after a map that only moves elements."""
        return self.with_shares(self.shares.map(function))

    def run(self, label: tuple[str, str], protocol: Protocol_[Shares]) -> PrivinfTensor:
        """What a protocol makes; its bytes and seconds are attributed to the label."""
        with self.party.label(*label):
            return self.with_shares(self.party.run(protocol))
