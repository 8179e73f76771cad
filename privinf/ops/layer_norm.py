"""LayerNorm without its affine part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from privinf.graph.builder import Builder, Constant, Unsupported, Value, aten, rule
from privinf.graph.node import Node
from privinf.graph.planning import FRAC, Bits, Planning, Shown, bits_for, up
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import PrivinfTensor
from privinf.ops.bias import shift
from privinf.ops.scale import scale
from protocols.errors import RangeError
from protocols.norm import centred
from protocols.norm import layer_norm as by_variance
from protocols.party import Protocol_
from protocols.shares import Shares


class LayerNorm(Node):
    """(x - mean) / sqrt(variance + epsilon) over the last axis of (..., d); scale and shift are nodes of their own, or folded."""

    op = "layer_norm"
    server_only = ("epsilon",)  # a folded checkpoint's is divided by the square of its betas, which are weights
    rowwise = True
    opened_frac: ClassVar[int] = 14  # at most
    normalised = staticmethod(by_variance)
    epsilon: float

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Below the root, beside the variance."""

        epsilon: float = 1e-5

    class Plan(AnyPlan, frozen=True, kw_only=True):
        """`size_bits`: a row's sum of squares stays below 2^size_bits; `input_bits`: the ring that its centring needs."""

        size_bits: Annotated[int, msgspec.Meta(ge=-64, le=64)]
        input_bits: Bits
        bits: Bits
        frac: Bits

        @property
        def needs(self) -> int:
            return self.input_bits

    plan: Plan

    def check(self) -> None:
        if not 0 < self.epsilon < 1:
            raise self.fail("epsilon must lie between 0 and 1")

    def generic(self, x: Any, *others: Any) -> Any:
        middle = x.sub(x.mean(-1, keepdim=True))
        variance = middle.square().mean(-1, keepdim=True).add(self.epsilon)
        return middle.mul(variance.rsqrt() if isinstance(x, torch.Tensor) else variance.inv_sqrt())

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        shape, plan = x.shares.shape, self.plan
        rows = x.shares.map(lambda v: v.reshape(-1, v.shape[-1]))
        y = yield from self.normalised(x.party, rows, epsilon=self.epsilon, size_bits=plan.size_bits, bits=plan.bits)
        return y.map(lambda v: v.reshape(shape))

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        x = inputs[0].double()
        yield "squares", (x - x.mean(-1, keepdim=True)).square().sum(-1) + x.shape[-1] * self.epsilon

    def name_of(self, part: str) -> str:
        return "a sum of squares" if part == "squares" else super().name_of(part)

    def make_plan(self, planning: Planning) -> Plan:
        size = up(math.log2(float(planning.ranges[self.name]["squares"])))
        if centred(size)[0] > 62:
            raise RangeError(f"a LayerNorm's sum of squares may reach 2^{size}, which no ring of 64 bits holds", layer=self.name)
        input_bits = bits_for(self.name, FRAC + 24, planning.input_range(self.name, 1.0))
        return self.Plan(size_bits=size, input_bits=input_bits, bits=planning.bits, frac=planning.frac)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        bits, frac = centred(self.plan.size_bits, self.opened_frac)
        yield Shown("squares", bits, 2 * frac, own.get("squares"))


@rule(aten.layer_norm.default)
def layer_norm(b: Builder, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Value:
    """Over the last axis, with its scale and shift as nodes of their own."""
    if len(shape) != 1:
        raise Unsupported("a LayerNorm over more than the last axis")
    y = b.by_rows(LayerNorm, x, epsilon=eps)
    if isinstance(weight, Constant):
        y = scale(b, y, weight)
    return shift(b, y, bias) if isinstance(bias, Constant) else y
