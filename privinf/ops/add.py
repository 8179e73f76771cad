"""The sum of two private values."""

from __future__ import annotations

from typing import Any

from privinf.crypten_adapter import stock
from privinf.graph.builder import Builder, Value, as_value, aten, rule, times
from privinf.graph.kinds import OfTwo
from privinf.graph.private import PrivinfTensor
from privinf.ops.bias import shift
from privinf.ops.scale import scale


class Add(OfTwo, stock.Add):  # type: ignore[misc]
    """x + y, two private values whose shapes broadcast."""

    op = "add"
    floats = stock.Add

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        return x.with_shares(x.shares + others[0].shares)


@rule(aten.add.Tensor, aten.add.Scalar)
def add(b: Builder, x: Any, y: Any, alpha: float = 1) -> Value:
    """x + alpha y, one of them private at least."""
    if isinstance(y, Value):
        y = scale(b, y, alpha)
        return b.emit(Add, x, y) if isinstance(x, Value) else shift(b, y, x)
    return shift(b, as_value(x), times(y, alpha))
