"""A max-plus layer with a private weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Value, as_constant, rule
from privinf.graph.kinds import matrix_output
from privinf.graph.node import Shape
from privinf.graph.planning import COMPARED_FRAC, Planning, Wanted
from privinf.graph.private import PrivinfTensor
from privinf.ops.relu import Compared
from protocols.max_plus import MOST_BITS, tropical
from protocols.max_plus import max_plus as of_shares
from protocols.party import Protocol_
from protocols.shares import Shares
from protocols.truncation import rescale


class OfSums(Compared):
    """What compares sums that it opens, and measures how large they are."""

    def make_plan(self, planning: Planning) -> Compared.Plan:
        compared, (out_bits, out_frac) = self._ring(planning), planning.output_for_readers(self.name)
        fields = {"bits": planning.bits, "frac": planning.frac, "out_frac": out_frac, "out_bits": out_bits}
        return self.Plan(compare_bits=compared, opened=compared, **fields)

    def _ring(self, planning: Planning) -> int:
        """Of the sums: any two of a row differ by less than half of it."""
        return self.compared_in(self.name, float(planning.ranges[self.name]["sums"]))

    def wants(self, planning: Planning, maker: str) -> Wanted:
        return Wanted(self._ring(planning) - COMPARED_FRAC)


class MaxPlus(OfSums):
    """x (..., n) -> max_i (x_i + W_ij), (..., m). weight (n, m), which S adds to its share: it is in no set-up."""

    op = "max_plus"
    required = ("weight",)
    most_bits = MOST_BITS

    def check(self) -> None:
        if len(self.parameter_shapes["weight"]) != 2:
            raise self.fail("weight must be (in, out)")

    def output_shape(self, *shapes: Shape) -> Shape:
        return matrix_output(self, shapes[0])

    def generic(self, x: Any, *others: Any) -> Any:
        if not isinstance(x, Tensor):
            raise self.fail("stock CrypTen has no protocol for it")
        return tropical(x, self.value("weight"))

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        plan, lead = self.plan, x.shares.shape[:-1]
        opened = yield from rescale(x.party, x.shares, bits=plan.opened, frac=COMPARED_FRAC)
        weight = self.constant_of(x.runtime, "weight", COMPARED_FRAC)
        flat = opened.map(lambda v: v.reshape(-1, v.shape[-1]))
        y = yield from of_shares(x.party, flat, weight, self.parameter_shapes["weight"][1])
        y = yield from rescale(x.party, y, bits=plan.out_bits, frac=plan.out_frac)
        return y.map(lambda v: v.reshape(*lead, -1))

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "sums", inputs[0].abs().amax(-1) + self.value("weight").abs().max()


@rule(torch.ops.privinf.max_plus.default)
def max_plus(b: Builder, x: Value, weight: Any) -> Value:
    """Of the operator that `protocols.max_plus` defines."""
    return b.by_rows(MaxPlus, x, weight=as_constant(weight).float())
