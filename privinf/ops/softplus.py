"""Softplus, log(1 + e^x)."""

from __future__ import annotations

from typing import Any

from privinf.graph.builder import Builder, Unsupported, Value, aten, rule
from privinf.ops.relu import Compared
from protocols.activation import FORMS, PRODUCT_BITS
from protocols.activation import softplus as pieces
from protocols.party import Party, Protocol_
from protocols.shares import Shares


class Softplus(Compared):
    """log(1 + e^x)."""

    op = "softplus"
    product_bits = PRODUCT_BITS
    most_bits = PRODUCT_BITS
    edge = FORMS["softplus"].edge

    def generic(self, x: Any, *others: Any) -> Any:
        return x.exp().add(1.0).log() if not hasattr(x, "logaddexp") else x.logaddexp(x.mul(0.0))

    def function(self, party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
        return pieces(party, x, compare_bits=self.plan.compare_bits, bits=bits)


@rule(aten.softplus.default)
def softplus(b: Builder, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    """Of any shape."""
    if beta != 1 or threshold < 16:
        raise Unsupported("a softplus that is another's: beta must be 1, and the threshold 16 at least")
    return b.by_rows(Softplus, x)
