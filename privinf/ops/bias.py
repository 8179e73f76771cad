"""A private value plus a private tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Constant, Unsupported, Value, as_number, broadcast_shape
from privinf.graph.node import Affine, Shape
from privinf.graph.private import PrivinfTensor
from privinf.ops.add_constant import AddConstant
from privinf.ops.cat import expand
from privinf.ops.scale import Broadcast, with_weight
from privinf.ops.softmax import MASKED, mask
from protocols.opening import add_server_constant


class Bias(Broadcast):
    """x (...) plus a private tensor that broadcasts into it."""

    op = "bias"

    def affine(self, width: int) -> Affine | None:
        ones = torch.ones(width, dtype=torch.float64)
        return (ones, ones * self.value("weight").double()) if self.rowwise else None

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        return True

    def generic(self, x: Any, *others: Any) -> Any:
        return x.add(self.value("weight"))

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        term = self.constant_of(x.runtime, "weight", x.shares.frac)
        return x.with_shares(add_server_constant(x.party, x.shares, term))


def shift(b: Builder, x: Value, term: Constant | float) -> Value:
    """x plus a constant, which may turn out to be a causal mask."""
    number = as_number(term)
    if number is not None:
        return x if number == 0.0 else b.by_rows(AddConstant, x, constant=number)
    assert isinstance(term, Constant)
    tensor = term.tensor.float()
    masked = tensor <= MASKED
    if bool(masked.any()):
        if not bool((tensor[~masked] != 0).any()):
            return mask(b, expand(b, x, broadcast_shape(x.shape, term.shape)), masked)
        if bool(tensor.isinf().any()) or _is_future(masked):
            raise Unsupported("a mask with other values than 0 and minus infinity")
    return with_weight(b, Bias, x, term)


def _is_future(masked: Tensor) -> bool:
    """Whether (..., T, T) masks what comes after each position. Large numbers anywhere else are no mask, but a term like any other."""
    if masked.dim() < 2 or masked.shape[-2] != masked.shape[-1]:
        return False
    return bool((masked == torch.ones(masked.shape[-2:], dtype=torch.bool).triu(1)).all())
