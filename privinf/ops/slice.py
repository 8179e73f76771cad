"""Some positions of one axis."""

from __future__ import annotations

from typing import Any

import msgspec

from privinf.graph.builder import Builder, Unsupported, Value, aten, rule
from privinf.graph.kinds import Moving
from privinf.graph.node import Shape

LAST = -1


class Slice(Moving):
    """Positions start, start + step, ... below stop of one axis (0 <= start < stop <= size, step >= 1).

    `dim` -1 is the last axis, whatever their number: then it treats all rows alike, and may stand in a graph for any length.
    """

    op = "slice"
    dim: int
    start: int
    stop: int
    step: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The axis, and what of it."""

        dim: int
        start: int
        stop: int
        step: int = 1

    @property
    def rowwise(self) -> bool:
        return self.dim == LAST

    def check(self) -> None:
        if self.dim < LAST or self.step < 1 or not 0 <= self.start < self.stop:
            raise self.fail(f"bad range {self.start}:{self.stop}:{self.step} on axis {self.dim}")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = list(shapes[0])
        if self.dim >= len(shape) or not shape or self.stop > shape[self.dim]:
            raise self.fail(f"range {self.start}:{self.stop} of axis {self.dim} is outside {shape}")
        shape[self.dim] = len(range(self.start, self.stop, self.step))
        return tuple(shape)

    def generic(self, x: Any, *others: Any) -> Any:
        axes = (...,) if self.dim == LAST else (slice(None),) * self.dim
        return x[(*axes, slice(self.start, self.stop, self.step))]


def take(b: Builder, x: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
    """Positions of one axis; all of them are the value itself."""
    dim %= len(x.shape)
    if (start, stop, step) == (0, x.shape[dim], 1):
        return x
    return b.emit(Slice, x, dim=dim, start=start, stop=stop, step=step)


@rule(aten.slice.Tensor)
def slice_(b: Builder, x: Value, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Value:
    """As in Python: negative and missing bounds, and bounds beyond the end."""
    start, stop, step = slice(start, stop, step).indices(x.shape[dim])
    if start >= stop:
        raise Unsupported("an empty slice")
    return take(b, x, dim, start, stop, step)
