"""The difference of two private values."""

from __future__ import annotations

from typing import Any

from privinf.crypten_adapter import stock
from privinf.graph.builder import Builder, Value, as_value, aten, rule, times
from privinf.graph.private import PrivinfTensor
from privinf.ops.add import Add
from privinf.ops.bias import shift
from privinf.ops.scale import scale


class Sub(Add, stock.Sub):  # type: ignore[misc]
    """x - y, two private values whose shapes broadcast."""

    op = "sub"
    floats = stock.Sub

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        return x.with_shares(x.shares - others[0].shares)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Value:
    """x - alpha y, one of them private at least."""
    if isinstance(y, Value):
        y = scale(b, y, alpha)
        return b.emit(Sub, x, y) if isinstance(x, Value) else shift(b, scale(b, y, -1.0), x)
    return shift(b, as_value(x), times(y, -alpha))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Value:
    """y - alpha x."""
    return sub(b, y, x, alpha)
