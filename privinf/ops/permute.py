"""Axes in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from privinf.graph.builder import Builder, Value, aten, rule
from privinf.graph.kinds import Moving
from privinf.graph.node import Shape
from privinf.ops.reshape import reshape


class Permute(Moving):
    """Axes in another order: axis i of the output is axis dims[i] of the input."""

    op = "permute"
    dims: list[int]

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The new order."""

        dims: list[int]

    def check(self) -> None:
        if sorted(self.dims) != list(range(len(self.dims))):
            raise self.fail(f"dims {self.dims} are no permutation")

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) != len(self.dims):
            raise self.fail(f"dims {self.dims} do not fit {list(shapes[0])}")
        return tuple(shapes[0][dim] for dim in self.dims)

    def moves_rows(self, before: Shape, after: Shape) -> bool:
        return self.dims[-1] == len(self.dims) - 1

    def generic(self, x: Any, *others: Any) -> Any:
        return x.permute(*self.dims)


@rule(aten.permute.default)
def permute(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    """x with axes in another order; two in a row are one, and moving axes of size 1 is a reshape."""
    dims = [dim % len(x.shape) for dim in dims]
    shape = tuple(x.shape[dim] for dim in dims)
    kept = [dim for dim in dims if x.shape[dim] != 1]
    if kept == sorted(kept):
        return reshape(b, x, shape)
    producer = b.draft.producer(x.key)
    if isinstance(producer, Permute):
        return permute(b, b.source(x), [producer.dims[dim] for dim in dims])
    return b.emit(Permute, x, dims=dims)


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(b: Builder, x: Value, first: int = -2, second: int = -1) -> Value:
    """x with two axes exchanged."""
    dims = list(range(len(x.shape)))
    dims[first], dims[second] = dims[second], dims[first]
    return permute(b, x, dims)
