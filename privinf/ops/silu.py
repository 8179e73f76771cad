"""SiLU, x times the logistic function of x."""

from __future__ import annotations

from typing import Any

from privinf.graph.builder import Builder, Value, aten, rule
from privinf.ops.relu import Compared
from protocols.activation import FORMS, PRODUCT_BITS
from protocols.activation import silu as pieces
from protocols.party import Party, Protocol_
from protocols.shares import Shares


class Silu(Compared):
    """x / (1 + e^-x)."""

    op = "silu"
    product_bits = PRODUCT_BITS
    most_bits = PRODUCT_BITS
    edge = FORMS["silu"].edge

    def generic(self, x: Any, *others: Any) -> Any:
        return x.mul(x.sigmoid())

    def function(self, party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
        return pieces(party, x, compare_bits=self.plan.compare_bits, bits=bits)


@rule(aten.silu.default)
def silu(b: Builder, x: Value) -> Value:
    """Of any shape."""
    return b.by_rows(Silu, x)
