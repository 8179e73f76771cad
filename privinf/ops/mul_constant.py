"""A private value times a public number."""

from __future__ import annotations

from typing import Any

import torch

from privinf.graph.kinds import Numbered, Product
from privinf.graph.node import Affine, Shape
from privinf.graph.private import PrivinfTensor
from protocols.party import Protocol_
from protocols.shares import Shares


class MulConstant(Numbered, Product):
    """x times a public constant."""

    op = "mul_constant"

    def affine(self, width: int) -> Affine | None:
        return torch.full((width,), self.constant, dtype=torch.float64), None

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        return self.constant > 0

    def generic(self, x: Any, *others: Any) -> Any:
        return x.mul(self.constant)

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        frac = self.plan.frac
        product = x.shares.narrow(self.plan.ring).times(round(self.constant * 2.0**frac), frac)
        return (yield from self.canonical(x.party, product))
