"""One position of one axis."""

from __future__ import annotations

from typing import Any

import msgspec

from privinf.graph.builder import Builder, Value, aten, rule
from privinf.graph.kinds import Moving
from privinf.graph.node import Shape
from privinf.ops.last_position import LastPosition


class Select(Moving):
    """One position of one axis, which disappears."""

    op = "select"
    dim: int
    index: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The axis and the position."""

        dim: int
        index: int

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if not (0 <= self.dim < len(shape) and 0 <= self.index < shape[self.dim]):
            raise self.fail(f"position {self.index} of axis {self.dim} is outside {list(shape)}")
        return (*shape[: self.dim], *shape[self.dim + 1 :])

    def generic(self, x: Any, *others: Any) -> Any:
        return x[(slice(None),) * self.dim + (self.index,)]


def pick(b: Builder, x: Value, dim: int, index: int) -> Value:
    """One position of one axis."""
    dim %= len(x.shape)
    return b.emit(Select, x, dim=dim, index=index % x.shape[dim])


@rule(aten.select.int)
def select(b: Builder, x: Value, dim: int, index: int) -> Value:
    """The last position of axis 1 has a node of its own."""
    return b.emit(LastPosition, x) if index == -1 and dim == 1 and len(x.shape) > 2 else pick(b, x, dim, index)
