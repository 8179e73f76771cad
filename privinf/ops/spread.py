"""Each column as many times as a head is wide."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from privinf.graph.builder import Builder, Value, as_value, rule
from privinf.graph.kinds import Moving
from privinf.graph.node import Shape


class Spread(Moving):
    """(..., H) -> (..., H each): every column `each` times, side by side."""

    op = "spread"
    rowwise = True
    each: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """How many times."""

        each: int

    def check(self) -> None:
        if not 1 <= self.each <= 1_000_000:
            raise self.fail(f"{self.each} times a column")

    def output_shape(self, *shapes: Shape) -> Shape:
        if not shapes[0]:
            raise self.fail("a single number has no columns")
        return (*shapes[0][:-1], shapes[0][-1] * self.each)

    def generic(self, x: Any, *others: Any) -> Any:
        if isinstance(x, Tensor) and x.is_meta:
            return x.new_empty(self.output_shape(tuple(x.shape)))
        return x[..., torch.arange(x.size(-1)).repeat_interleave(self.each)]


@rule(torch.ops.privinf.spread.default)
def spread(b: Builder, x: Any, each: int) -> Value:
    """Of the operator that `protocols.recurrence` defines."""
    return b.emit(Spread, as_value(x), each=each)
