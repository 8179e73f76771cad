"""A private value times a private tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Constant, Value, as_number, broadcast_shape
from privinf.graph.kinds import Weighing
from privinf.graph.node import Affine, Node, Shape, broadcast
from privinf.graph.private import PrivinfTensor
from privinf.ops.cat import expand
from privinf.ops.mul_constant import MulConstant
from protocols.linear import scale as times_diagonal
from protocols.party import Protocol_
from protocols.shares import Shares


class Broadcast(Node):
    """x (...) with a private tensor that broadcasts into it. weight: any shape of at most x's rank."""

    required = ("weight",)

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = broadcast(self, shapes[0], self.parameter_shapes["weight"])
        if shape != shapes[0]:
            raise self.fail(f"weight does not broadcast into {list(shapes[0])}")
        return shape

    @property
    def rowwise(self) -> bool:
        """Where the tensor is a vector along the last axis, or a single number."""
        return len(self.parameter_shapes["weight"]) <= 1


class Scale(Broadcast, Weighing):
    """x (...) times a private tensor that broadcasts into it."""

    op = "scale"
    multiplies = True

    def affine(self, width: int) -> Affine | None:
        return (torch.ones(width, dtype=torch.float64) * self.value("weight").double(), None) if self.rowwise else None

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        return self.has_values and bool((self.value("weight") > 0).all())  # such as 1 / temperature

    def hides_the_future(self) -> bool:
        """Whether it multiplies scores by a lower triangle of ones."""
        weight: Tensor = self.value("weight")
        return weight.dim() >= 2 and weight.shape[-1] == weight.shape[-2] and bool((weight == torch.ones_like(weight).tril()).all())

    def generic(self, x: Any, *others: Any) -> Any:
        return x.mul(self.value("weight"))

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        weight, ring = x.runtime.weights[f"{self.name}.weight"], self.plan.ring
        y = yield from times_diagonal(x.party, x.shares.narrow(ring), weight, bits=ring)
        return (yield from self.canonical(x.party, y))


def with_weight(b: Builder, kind: type[Node], x: Value, constant: Constant | float) -> Value:
    """x with a private tensor, each expanded to the shape that both have together."""
    assert isinstance(constant, Constant)
    x = expand(b, x, broadcast_shape(x.shape, constant.shape))
    weight = constant.tensor.float()
    while weight.dim() > len(x.shape) or (weight.dim() > 1 and weight.shape[0] == 1):
        weight = weight[0]  # leading axes of size 1
    emit = b.by_rows if weight.dim() <= 1 else b.emit
    return emit(kind, x, weight=weight)


def scale(b: Builder, x: Value, factor: Constant | float) -> Value:
    """x times a constant: public if it is a number in the code, private if it comes from the weights."""
    number = as_number(factor)
    if number is not None:
        return x if number == 1.0 else b.by_rows(MulConstant, x, constant=number)
    return with_weight(b, Scale, x, factor)
