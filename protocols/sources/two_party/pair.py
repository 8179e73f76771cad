"""What a party has while the two make correlations: its end of the transfers and of the lattice, its weights, its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from protocols.correlations import OfRole, Part, Role
from protocols.errors import CorrelationError
from protocols.lattice.lines import Joined
from protocols.prg import Prg, new_seed
from protocols.rounds import Protocol_
from protocols.shares import Shared
from protocols.sources.two_party.sketch import sketch


class TransfersEnd(Protocol):
    """One party's end of oblivious transfer, both directions; every method is a protocol. See `protocols.ot.transfers`."""

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        """Shares of choice * delta, elementwise: choice (0 or 1) at the receiver, delta at the sender; modulo 2^bits, or by XOR."""

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int, drop: int = 0) -> Protocol_[Tensor]:
        """Shares of x * y modulo 2^bits, elementwise: x at the sender, 0 <= y < 2^y_bits at the receiver.

        With `drop`, of x * y / 2^drop to within `drop` / 2, for x modulo 2^(bits + drop).
        """

    def chosen(self, sender: Role, choice: Tensor, words: Tensor, choice_bits: int, bits: int) -> Protocol_[Tensor]:
        """words (..., 2^choice_bits) at the sender, choice (...) at the receiver, who gets (...) of `bits`; the sender gets zeros."""

    def ands(self, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """XOR shares of x & y, words of `bits` bits, from XOR shares; one round."""


class WeightsEnd(Protocol):
    """What C and S do with S's encrypted weights."""

    def linear(self, weight: Any, r: Tensor, out: int, bits: int, *, transposed: bool = False) -> Protocol_[Tensor]:
        """Shares of -(r W), (..., out), modulo 2^bits: r (..., in) at C; `weight` is what each has of W, None where only shapes count."""

    def lookup(self, table: Any, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """Shares of rows (count, out) of a table (size, out) modulo 2^bits: ids (count,) at C. One message of C's."""


class LatticeEnd(WeightsEnd, Protocol):
    """One party's end of encrypted linear algebra; every method is a protocol. See `protocols.lattice`."""

    def matmul(
        self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None, kept: Joined | None = None
    ) -> Protocol_[Tensor]:
        """Shares of left @ right modulo 2^bits: right (..., d, m) at `holder`, who encrypts, left (..., n, d) at the other.

        `need` (n, m), bool and public: which outputs are wanted; the others may be anything. `kept`: right is joined along an axis from
        pieces
        with names, and stays for later products.
        """

    def forget(self) -> None:
        """What was kept will not come again."""


class Pieces(NamedTuple):
    """Of which masks, that outlive their pass, a right operand is joined along an axis, -1 or -2: names, and how many places each has."""

    axis: int
    names: tuple[int, ...]
    sizes: tuple[int, ...]


class MakersLattice(WeightsEnd, Protocol):
    """What makers have of it: see `schedule.BatchedLattice`."""

    def matmul(
        self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None, pieces: Pieces | None = None
    ) -> Protocol_[Tensor]:
        """See `LatticeEnd`; both have the same heads, and `pieces` make up right."""

    def columns(self, holder: Role, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """Shares of x * y modulo 2^bits: y (n, 1) at `holder`, x (n, w) at the other; whichever is cheaper to encrypt is encrypted."""


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Secret(Shared):
    """A secret of which `value` is this party's share: additive modulo 2^bits, or an XOR of words of `bits` bits."""

    value: Tensor = field(repr=False)
    bits: int
    xor: bool = False

    def __repr__(self) -> str:
        return f"Secret(shape={self.shape}, bits={self.bits}, xor={self.xor}, value hidden)"


class Pair(OfRole):
    """One party of the two while they make correlations.

    `weights`: at S the encoded tensors, at C what it keeps of each that `lattice.linear` takes (a diagonal weight has nothing at
    C). `masks`: this party's shares of the masks that correlations left, by name; `kept`: which outlive their pass. `traced`: on shapes
    alone.
    """

    def __init__(
        self,
        role: Role,
        transfers: TransfersEnd,
        lattice: MakersLattice,
        weights: Mapping[str, Any],
        *,
        traced: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.role, self.transfers, self.lattice, self.weights = role, transfers, lattice, weights
        self.traced, self.device = traced, device
        self.masks: dict[int, Secret] = {}
        self.kept: set[int] = set()
        self._prg, self._drawn = Prg(new_seed()), 0  # this party's own randomness: no peer expands it

    def __repr__(self) -> str:
        return f"Pair(role={self.role.value}, masks={len(self.masks)}, values hidden)"

    def mask(self, name: int) -> Secret:
        """This party's share of the mask that an earlier correlation left under this name."""
        found = self.masks.get(name)
        if found is None:
            raise CorrelationError(f"a correlation refers to the mask {name}, which does not exist", party=self.role.value)
        return found

    def weight(self, name: str) -> Any:
        """What this party has of a weight; on shapes, and where C keeps nothing of it, None."""
        if self.traced:
            return None
        found = self.weights.get(name)
        if found is None and self.is_server:
            raise CorrelationError(f"a correlation refers to the weight {name[:80]!r}, which does not exist", party=self.role.value)
        return found

    def draw(self, part: Part) -> Tensor:
        """Fresh uniform elements of this party's own, or a blank of their shape."""
        if self.traced:
            return sketch(part.shape)
        self._drawn += 1
        return part.draw(self._prg.stream(self._drawn), self.device)

    def uniform(self, shape: tuple[int, ...], bits: int) -> Tensor:
        """The same for elements of Z_2^bits."""
        return self.draw(Part(shape, bits))
