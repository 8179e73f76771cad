"""A short convolution over positions, column by column, with the positions that it keeps for the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Value, as_constant, as_value, rule
from privinf.graph.kinds import Weighing
from privinf.graph.node import Shape
from privinf.graph.private import PrivinfTensor
from protocols.linear import scale
from protocols.party import Protocol_
from protocols.recurrence import short_convolution
from protocols.ring import blank, known
from protocols.scan import State
from protocols.shares import Shares


class Taps(Weighing):
    """y_t = sum_k weight_k x_(t - K + 1 + k), x (B, T, d), weight (K, 1, d): each column by itself, zeros before the first position."""

    op = "taps"
    state = ("state",)
    any_length = True

    def check(self) -> None:
        weight = self.parameter_shapes["weight"]
        if len(weight) != 3 or weight[1] != 1 or not 2 <= weight[0] <= 64:
            raise self.fail("weight must be (K, 1, d), of 2 to 64 taps")

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes[0]) != 3 or shapes[0][2] != self.parameter_shapes["weight"][2]:
            raise self.fail(f"input {list(shapes[0])} does not fit its weight")
        return shapes[0]

    def generic(self, x: Any, *others: Any) -> Any:
        return short_convolution(x, self.value("weight"))

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        runtime, plan, taps = x.runtime, self.plan, self.parameter_shapes["weight"][0]
        before: Mapping[str, Any] = runtime.state.get(self.name, {})
        held: State | None = before.get("state")
        now = x.shares.value
        earlier = now.new_zeros((1, taps - 1, now.shape[2])) if held is None else held.shares.value
        early = x.shares.early and held is None
        count = now.shape[1]
        if known(now, earlier):
            all_ = torch.cat([earlier, now], 1)  # (1, K - 1 + T, d)
            rows = torch.cat([all_[:, k : k + count] for k in range(taps)])  # (K, T, d)
        else:
            all_, rows = blank(1, taps - 1 + count, now.shape[2]), blank(taps, count, now.shape[2])
        stacked = Shares(rows, plan.ring, x.shares.frac, early)
        self.keep(runtime, state=State(Shares(all_[:, count:], x.shares.bits, x.shares.frac)))
        y = yield from scale(x.party, stacked, runtime.weights[f"{self.name}.weight"], bits=plan.ring)
        return (yield from self.canonical(x.party, y.map(_sum)))


@rule(torch.ops.privinf.taps.default)
def taps(b: Builder, x: Any, weight: Any) -> Value:
    """Of the operator that `protocols.recurrence` defines."""
    return b.emit(Taps, as_value(x), weight=as_constant(weight).float())


def _sum(x: Tensor) -> Tensor:
    """(K, T, d) -> (1, T, d)."""
    return x.sum(0, keepdim=True) if known(x) else blank(1, *x.shape[1:])
