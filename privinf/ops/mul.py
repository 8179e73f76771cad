"""The elementwise product of two private values."""

from __future__ import annotations

from typing import Any

from privinf.crypten_adapter import stock
from privinf.graph.builder import Builder, Value, as_value, aten, rule
from privinf.graph.kinds import OfTwo, Product
from privinf.graph.private import PrivinfTensor
from privinf.ops.scale import scale
from protocols.party import Protocol_
from protocols.product import multiply
from protocols.shares import Shares


class Mul(OfTwo, Product, stock.Mul):  # type: ignore[misc]
    """Elementwise x y, two private values whose shapes broadcast; x may be y."""

    op = "mul"
    floats = stock.Mul

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        one, other = yield from self.opened(x, others[0])
        return (yield from self.canonical(x.party, multiply(x.party, one, other, self.plan.ring)))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(b: Builder, x: Any, y: Any) -> Value:
    """x y, one of them private at least."""
    if isinstance(x, Value):
        return b.emit(Mul, x, y) if isinstance(y, Value) else scale(b, x, y)
    return scale(b, as_value(y), x)
