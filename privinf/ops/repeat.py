"""Every element of an axis several times in a row."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from privinf.graph.builder import Builder, Value
from privinf.graph.kinds import Moving
from privinf.graph.node import Shape


class Repeat(Moving):
    """Axis `dim` with each of its elements `times` times in a row."""

    op = "repeat"
    dim: int
    times: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The axis, and how often."""

        dim: int
        times: int

    def check(self) -> None:
        if self.dim < 0 or not 1 <= self.times <= 1024:
            raise self.fail(f"{self.times} times axis {self.dim}")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = list(shapes[0])
        if self.dim >= len(shape):
            raise self.fail(f"{shape} has no axis {self.dim}")
        shape[self.dim] *= self.times
        return tuple(shape)

    def generic(self, x: Any, *others: Any) -> Any:
        index = torch.arange(x.size(self.dim)).repeat_interleave(self.times)
        return x[(*(slice(None),) * self.dim, index.to(x.device) if isinstance(x, torch.Tensor) else index)]


def repeat(b: Builder, x: Value, dim: int, times: int) -> Value:
    """x with each element of an axis several times; once is x itself."""
    return x if times == 1 else b.emit(Repeat, x, dim=dim % len(x.shape), times=times)
