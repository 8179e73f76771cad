"""The matrix product of two private values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import stock
from privinf.graph.builder import MAX_COPIES, Builder, Constant, Unsupported, Value, as_value, aten, broadcast_shape, rule, times
from privinf.graph.kinds import Product
from privinf.graph.node import Shape
from privinf.graph.private import PrivinfTensor
from privinf.ops.add import add
from privinf.ops.cat import Cat, expand
from privinf.ops.linear import linear
from privinf.ops.permute import transpose
from privinf.ops.reshape import reshape
from privinf.ops.scale import scale
from privinf.ops.slice import take
from protocols.party import Protocol_
from protocols.product import Cached, matmul_wires
from protocols.shares import Shares


class MatMul(Product, stock.MatMul):  # type: ignore[misc]
    """(..., M, K) times (..., K, N) -> (..., M, N), two private values with equal leading axes (rank 2 and above)."""

    op = "matmul"
    arity = 2

    def output_shape(self, *shapes: Shape) -> Shape:
        x, y = shapes
        if len(x) < 2 or x[:-2] != y[:-2] or x[-1] != y[-2]:
            raise self.fail(f"shapes {list(x)} and {list(y)} have no matrix product")
        return (*x[:-1], y[-1])

    def generic(self, x: Any, *others: Any) -> Any:
        return stock.MatMul.forward(self, (x, *others))

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        one, other = yield from self.opened(x, others[0])
        z = matmul_wires(x.party, one, Cached.join(None, other), self.plan.ring)
        return (yield from self.canonical(x.party, z))


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(b: Builder, x: Value | Constant, y: Value | Constant) -> Value:
    """torch.matmul of a private value with a private value or a constant."""
    if len(x.shape) == 1 or len(y.shape) == 1:
        wide_x = unsqueeze(b, x, 0) if len(x.shape) == 1 else x  # (1, K)
        wide_y = unsqueeze(b, y, 1) if len(y.shape) == 1 else y  # (K, 1)
        return reshape(b, matmul(b, wide_x, wide_y), product_shape(x.shape, y.shape))
    if isinstance(x, Constant):
        return transpose(b, matmul(b, transpose(b, as_value(y)), Constant(x.tensor.mT, x.private)))
    lead = broadcast_shape(x.shape[:-2], y.shape[:-2])
    if isinstance(y, Constant):
        if y.tensor.numel() == y.shape[-2] * y.shape[-1]:  # one matrix for all
            x = reshape(b, x, (1,) * (len(lead) - len(x.shape[:-2])) + x.shape)
            return linear(b, x, y.tensor.reshape(y.shape[-2:]).float())
        return _each(b, expand(b, x, (*lead, *x.shape[-2:])), y.tensor.expand(*lead, *y.shape[-2:]).float())
    return b.emit(MatMul, expand(b, x, (*lead, *x.shape[-2:])), expand(b, y, (*lead, *y.shape[-2:])))


def _each(b: Builder, x: Value, matrices: Tensor) -> Value:
    """x (..., M, K) @ matrices (..., K, N), a constant matrix for each leading index."""
    shape = (*x.shape[:-1], matrices.shape[-1])
    count = matrices.shape[:-2].numel()
    if count > MAX_COPIES:
        raise Unsupported(f"a batch of {count} different constant matrices")
    x = reshape(b, x, (count, *x.shape[-2:]))
    flat = matrices.reshape(count, *matrices.shape[-2:])
    rows = [linear(b, take(b, x, 0, i, i + 1), flat[i]) for i in range(count)]
    return reshape(b, b.emit(Cat, *rows, dim=0) if count > 1 else rows[0], shape)


def product_shape(x: Shape, y: Shape) -> Shape:
    """Of the product of these shapes."""
    return tuple(torch.matmul(torch.empty(x, device="meta"), torch.empty(y, device="meta")).shape)


def unsqueeze(b: Builder, x: Value | Constant, dim: int) -> Value | Constant:
    """With another axis of size 1."""
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return Constant(x.tensor.reshape(shape), x.private) if isinstance(x, Constant) else reshape(b, x, shape)


@rule(aten.linear.default)
def linear_of_a_value(b: Builder, x: Any, weight: Any, bias: Any = None) -> Any:
    """x weight^T + bias, where weight or bias is a private value."""
    if isinstance(x, Value) and isinstance(weight, Constant) and (bias is None or isinstance(bias, Constant)):
        return NotImplemented
    turned = transpose(b, weight) if isinstance(weight, Value) else Constant(weight.tensor.t(), weight.private)
    y = matmul(b, x, turned)
    return y if bias is None else add(b, y, bias)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def addmm(b: Builder, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    """beta bias + alpha x y."""
    if isinstance(x, Value) and isinstance(y, Constant) and isinstance(bias, Constant) and y.shape[-1:] == bias.shape and len(y.shape) == 2:
        return linear(b, x, y.tensor.float() * alpha, bias.tensor.float() * beta)
    product = scale(b, matmul(b, x, y), alpha)
    if beta == 0:
        return product
    return add(b, product, scale(b, bias, beta) if isinstance(bias, Value) else times(bias, beta))
