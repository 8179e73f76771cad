"""RMSNorm without its scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Constant, Unsupported, Value, aten, rule
from privinf.graph.planning import FRAC, Planning, up
from privinf.ops.layer_norm import LayerNorm
from privinf.ops.scale import scale
from protocols.errors import RangeError
from protocols.norm import WHOLE_FRAC, centred
from protocols.norm import rms_norm as by_squares


class RmsNorm(LayerNorm):
    """x / sqrt(mean of squares + epsilon) over the last axis of (..., d); the scale is a node of its own, or folded."""

    op = "rms_norm"
    opened_frac = WHOLE_FRAC
    normalised = staticmethod(by_squares)

    def generic(self, x: Any, *others: Any) -> Any:
        mean = x.square().mean(-1, keepdim=True).add(self.epsilon)
        return x.mul(mean.rsqrt() if isinstance(x, torch.Tensor) else mean.inv_sqrt())

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        x = inputs[0].double()
        yield "squares", x.square().sum(-1) + x.shape[-1] * self.epsilon

    def make_plan(self, planning: Planning) -> LayerNorm.Plan:
        size = up(math.log2(float(planning.ranges[self.name]["squares"])))
        bits, frac = centred(size, WHOLE_FRAC)
        if bits > 62:
            raise RangeError(f"an RMSNorm's sum of squares may reach 2^{size}, which no ring of 64 bits holds", layer=self.name)
        input_bits = min(64, bits + FRAC - frac)  # what is opened is a reduction of the input
        return self.Plan(size_bits=size, input_bits=input_bits, bits=planning.bits, frac=planning.frac)


@rule(aten.rms_norm.default)
def rms_norm(b: Builder, x: Value, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Value:
    """Over the last axis, with its scale as a node of its own."""
    if len(shape) != 1:
        raise Unsupported("an RMSNorm over more than the last axis")
    y = b.by_rows(RmsNorm, x, epsilon=torch.finfo(torch.float32).eps if eps is None else eps)
    return scale(b, y, weight) if isinstance(weight, Constant) else y
