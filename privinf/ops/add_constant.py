"""A private value plus a public number."""

from __future__ import annotations

from typing import Any

import torch

from privinf.graph.kinds import Numbered
from privinf.graph.node import Affine, Shape
from privinf.graph.private import PrivinfTensor
from protocols.opening import add_server_constant


class AddConstant(Numbered):
    """x plus a public constant."""

    op = "add_constant"

    def affine(self, width: int) -> Affine | None:
        ones = torch.ones(width, dtype=torch.float64)
        return ones, ones * self.constant

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        return True

    def generic(self, x: Any, *others: Any) -> Any:
        return x.add(self.constant)

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        constant = torch.tensor(round(self.constant * 2.0**x.shares.frac)) if x.party.is_server else None
        return x.with_shares(add_server_constant(x.party, x.shares, constant))
