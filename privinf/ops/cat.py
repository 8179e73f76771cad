"""Values side by side, and copies of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch

from privinf.crypten_adapter import crypten_module
from privinf.graph.builder import MAX_COPIES, Builder, Constant, Unsupported, Value, as_value, aten, rule
from privinf.graph.node import Node, Shape
from privinf.graph.private import PrivinfTensor
from privinf.ops.reshape import reshape


class Cat(Node):
    """Two or more values side by side along one axis."""

    op = "cat"
    arity = None
    dim: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The axis."""

        dim: int

    def output_shape(self, *shapes: Shape) -> Shape:
        dim, first = self.dim, shapes[0]
        rest = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if not 0 <= dim < len(first) or len(rest) != 1 or any(len(shape) != len(first) for shape in shapes):
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} do not line up along axis {dim}")
        return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])

    def generic(self, x: Any, *others: Any) -> Any:
        return (torch if isinstance(x, torch.Tensor) else crypten_module()).cat([x, *others], dim=self.dim)

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        parts = [x.shares, *(other.shares for other in others)]
        known = all(not p.value.is_meta for p in parts)
        value = torch.cat([p.value if known else p.value.to("meta") for p in parts], self.dim)
        early = all(p.early for p in parts)
        return x.with_shares(replace(x.shares, value=value, bits=min(p.bits for p in parts), early=early))


@rule(aten.cat.default, aten.concat.default)
def cat(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Value:
    """Private values side by side; an empty constant among them is nothing."""
    wires = [as_value(value) for value in tensors if not (isinstance(value, Constant) and value.tensor.numel() == 0)]
    return wires[0] if len(wires) == 1 else b.emit(Cat, *wires, dim=dim % len(wires[0].shape))


def expand(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """x copied along the axes where it has size 1 and `shape` more."""
    x = reshape(b, x, (1,) * (len(shape) - len(x.shape)) + x.shape)
    for dim, size in enumerate(shape):
        if size not in (-1, x.shape[dim]):
            if size > MAX_COPIES:
                raise Unsupported(f"a private value copied {size} times")
            x = b.emit(Cat, *[x] * size, dim=dim)
    return x


@rule(aten.expand.default, aten.expand_as.default)
def to_result(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """x as large as the result."""
    return expand(b, x, b.result_shape)
