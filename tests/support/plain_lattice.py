"""An insecure twin of `protocols.lattice.Lattice` for tests: the same methods and results, by sending values in the clear."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from protocols.correlations import Role
from protocols.matrix import matmul, matmul_transposed
from protocols.prg import Prg, new_seed
from protocols.ring import blank, reduce
from protocols.rounds import Item, Protocol_


def _wanted(product: Tensor, need: Tensor | None) -> Tensor:
    """What nobody wants is spoilt, so that a test sees whoever reads it."""
    return product if need is None else product * need + ~need * 12345


class PlainLattice:
    """One party's end. What C keeps of a weight for `linear` is the weight itself."""

    def __init__(self, role: Role, transfers: Any = None, traced: bool = False) -> None:
        self.role, self.traced = role, traced
        self._own, self._count = Prg(new_seed()), 0

    def _split(self, value: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        self._count += 1
        share = self._own.stream(self._count).uniform(tuple(value.shape), bits)
        return share, reduce(value - share, bits)

    @property
    def resting(self) -> int:
        """Nothing stays."""
        return 0

    def start(self) -> Protocol_[None]:
        """Nothing is needed."""
        return
        yield

    def apart(self) -> PlainLattice:
        return self

    def forget(self) -> None:
        """See `LatticeEnd`."""

    def matmul(
        self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None, kept: Any = None
    ) -> Protocol_[Tensor]:
        """See `LatticeEnd`."""
        holds, server = self.role is holder, holder is Role.SERVER
        (encrypted,) = yield [Item(right, bits, from_server=server, from_client=not server)]
        share = rest = blank(*left.shape[:-1], right.shape[-1])
        if not holds and not self.traced:
            share, rest = self._split(_wanted(matmul(left, encrypted, bits), need), bits)
        (got,) = yield [Item(rest, bits, from_server=not server, from_client=server)]
        return got if holds else share

    def linear(self, weight: Any, r: Tensor, out: int, bits: int, *, transposed: bool = False) -> Protocol_[Tensor]:
        """See `LatticeEnd`."""
        share = rest = blank(*r.shape[:-1], out)
        if self.role is Role.CLIENT and not self.traced:
            rows = r.reshape(math.prod(r.shape[:-1]), r.shape[-1])
            product = matmul_transposed(rows, weight, bits) if transposed else matmul(rows, weight, bits)
            share, rest = self._split(-product.reshape(*r.shape[:-1], out), bits)
        (got,) = yield [Item(rest, bits, from_server=False)]
        return got if self.role is Role.SERVER else share

    def lookup(self, table: Any, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """See `LatticeEnd`."""
        share = rest = blank(ids.shape[0], out)
        if self.role is Role.CLIENT and not ids.is_meta:
            assert table.shape == (size, out)
            share, rest = self._split(table[ids], bits)
        (got,) = yield [Item(rest, bits, from_server=False)]
        return got if self.role is Role.SERVER else share
