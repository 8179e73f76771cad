"""The nodes that only move elements; free in every protocol. Importing `nodes` imports these too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from privinf.crypten_adapter import crypten_module
from privinf.lowering.node_base import Node, Shape


class Reshape(Node):
    """The same elements in row-major order in another shape; at most one size is -1."""

    op = "reshape"
    shape: list[int]

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        shape: list[int]

    def output_shape(self, *shapes: Shape) -> Shape:
        try:
            return tuple(torch.empty(shapes[0], device="meta").reshape(self.shape).shape)
        except RuntimeError:
            raise self.fail(f"{list(shapes[0])} cannot become {self.shape}") from None

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.reshape(*self.shape) if self.shape else x.reshape([])


class Permute(Node):
    """Axes in another order: axis i of the output is axis dims[i] of the input."""

    op = "permute"
    dims: list[int]

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        dims: list[int]

    def check(self) -> None:
        if sorted(self.dims) != list(range(len(self.dims))):
            raise self.fail(f"dims {self.dims} are no permutation")

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) != len(self.dims):
            raise self.fail(f"dims {self.dims} do not fit {list(shapes[0])}")
        return tuple(shapes[0][dim] for dim in self.dims)

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.permute(*self.dims)


class Slice(Node):
    """Positions start, start + step, ... below stop of one axis (0 <= start < stop <= size, step >= 1)."""

    op = "slice"
    dim: int
    start: int
    stop: int
    step: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        dim: int
        start: int
        stop: int
        step: int = 1

    def check(self) -> None:
        if self.dim < 0 or self.step < 1 or not 0 <= self.start < self.stop:
            raise self.fail(f"bad range {self.start}:{self.stop}:{self.step} on axis {self.dim}")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = list(shapes[0])
        if self.dim >= len(shape) or self.stop > shape[self.dim]:
            raise self.fail(f"range {self.start}:{self.stop} of axis {self.dim} is outside {shape}")
        shape[self.dim] = len(range(self.start, self.stop, self.step))
        return tuple(shape)

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x[(slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)]


class Select(Node):
    """One position of one axis, which disappears."""

    op = "select"
    dim: int
    index: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        dim: int
        index: int

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if not (0 <= self.dim < len(shape) and 0 <= self.index < shape[self.dim]):
            raise self.fail(f"position {self.index} of axis {self.dim} is outside {list(shape)}")
        return (*shape[: self.dim], *shape[self.dim + 1 :])

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x[(slice(None),) * self.dim + (self.index,)]


class Cat(Node):
    """Two or more values side by side along one axis."""

    op = "cat"
    arity = None
    dim: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        dim: int

    def output_shape(self, *shapes: Shape) -> Shape:
        dim, first = self.dim, shapes[0]
        rest = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if not 0 <= dim < len(first) or len(rest) != 1 or any(len(shape) != len(first) for shape in shapes):
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} do not line up along axis {dim}")
        return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])

    def generic(self, *inputs: Any) -> Any:
        if isinstance(inputs[0], torch.Tensor):
            return torch.cat(inputs, dim=self.dim)
        return crypten_module().cat(list(inputs), dim=self.dim)


class LastPosition(Node):
    """The last position of axis 1: (B, T, ...) -> (B, ...)."""

    op = "last_position"

    def output_shape(self, *shapes: Shape) -> Shape:
        shape: Sequence[int] = shapes[0]
        if len(shape) < 2:
            raise self.fail(f"{list(shape)} has no axis of positions")
        return (shape[0], *shape[2:])

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x[:, x.size(1) - 1]
