"""Softplus, log(1 + e^x)."""

from __future__ import annotations

from typing import Any

from privinf.graph.builder import Builder, Unsupported, Value, aten, rule
from privinf.graph.planning import COMPARED_FRAC, Planning
from privinf.ops.relu import Compared
from protocols.activation import FORMS, PRODUCT_BITS
from protocols.activation import softplus as pieces
from protocols.party import Party, Protocol_
from protocols.shares import Shares

FINE_FRAC = 20  # of what only products read: a recurrence's step is next to 0 where it forgets nothing, and multiplies all that it adds


class Softplus(Compared):
    """log(1 + e^x)."""

    op = "softplus"
    product_bits = PRODUCT_BITS
    most_bits = PRODUCT_BITS
    edge = FORMS["softplus"].edge

    class Plan(Compared.Plan, frozen=True, kw_only=True):
        """With finer results, or not."""

        @property
        def made_frac(self) -> int:
            return max(self.out_frac, COMPARED_FRAC)

        @property
        def needs(self) -> int:
            return max(super().needs, self.compare_bits + self.out_frac - COMPARED_FRAC)

    plan: Plan

    def generic(self, x: Any, *others: Any) -> Any:
        return x.exp().add(1.0).log() if not hasattr(x, "logaddexp") else x.logaddexp(x.mul(0.0))

    def make_plan(self, planning: Planning) -> Plan:
        plan = super().make_plan(planning)
        frac = FINE_FRAC if planning.multiplied(self.name) else plan.out_frac
        return self.Plan(**{**plan.record(), "out_frac": frac})

    def function(self, party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
        return pieces(party, x, compare_bits=self.plan.compare_bits, bits=bits, frac=self.plan.made_frac)


@rule(aten.softplus.default)
def softplus(b: Builder, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    """Of any shape."""
    if beta != 1 or threshold < 16:
        raise Unsupported("a softplus that is another's: beta must be 1, and the threshold 16 at least")
    return b.by_rows(Softplus, x)
