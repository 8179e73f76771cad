"""The table from ATen operators to nodes: one small function per operator, which reads like the operator's signature.

A rule gets a `Builder`, then the operator's arguments: a `Wire` is a private value, a `Constant` a tensor that does not depend
on the inputs, everything else is a Python value. It returns a `Wire` (or a tuple of them), or raises `Unsupported`. Operators
all of whose arguments are constants never reach a rule: they are evaluated once. Rules for operators that only move elements
are in `table_layout`. To add an operator, write one function under `@rule(aten.name.overload, ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from privinf.lowering.builder import Builder, Constant, Unsupported, Wire, as_constant, as_wire, times
from privinf.lowering.nodes import Add, Embedding, Mul, Softmax, Sub

aten = torch.ops.aten

R = TypeVar("R", bound=Callable[..., Any])
TABLE: dict[Any, Callable[..., Any]] = {}


def rule(*operators: Any) -> Callable[[R], R]:
    """Register a rule for these ATen overloads."""

    def register(function: R) -> R:
        for operator in operators:
            TABLE[operator] = function
        return function

    return register


# ---- sums and products


@rule(aten.add.Tensor, aten.add.Scalar)
def add(b: Builder, x: Any, y: Any, alpha: float = 1) -> Wire:
    if isinstance(y, Wire):
        y = b.scale(y, alpha)
        return b.emit(Add, x, y) if isinstance(x, Wire) else b.shift(y, x)
    return b.shift(as_wire(x), times(y, alpha))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Wire:
    if isinstance(y, Wire):
        y = b.scale(y, alpha)
        return b.emit(Sub, x, y) if isinstance(x, Wire) else b.shift(b.scale(y, -1.0), x)
    return b.shift(as_wire(x), times(y, -alpha))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(b: Builder, x: Any, y: Any, alpha: float = 1) -> Wire:
    return sub(b, y, x, alpha)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(b: Builder, x: Any, y: Any) -> Wire:
    if isinstance(x, Wire):
        return b.emit(Mul, x, y) if isinstance(y, Wire) else b.scale(x, y)
    return b.scale(as_wire(y), x)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(b: Builder, x: Any, y: Any) -> Wire:
    if isinstance(y, Wire):
        raise Unsupported("division by a private value")
    if isinstance(y, Constant):
        return b.scale(as_wire(x), Constant(1.0 / y.tensor.float(), y.private))
    return b.scale(as_wire(x), 1.0 / y)


@rule(aten.neg.default)
def neg(b: Builder, x: Wire) -> Wire:
    return b.scale(x, -1.0)


@rule(aten.pow.Tensor_Scalar)
def power(b: Builder, x: Wire, exponent: float) -> Wire:
    if exponent == 1:
        return x
    if exponent not in (2, 3):
        raise Unsupported(f"the power {exponent} of a private value")
    y = b.emit(Mul, x, x)
    return y if exponent == 2 else b.emit(Mul, y, x)


@rule(aten.square.default)
def square(b: Builder, x: Wire) -> Wire:
    return b.emit(Mul, x, x)


@rule(aten.sum.dim_IntList, aten.sum.default)
def total(b: Builder, x: Wire, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Wire:
    for dim in dims if dims else range(len(x.shape)):
        x = b.total(x, dim)
    return b.reshape(x, b.result_shape)


@rule(aten.mean.dim, aten.mean.default)
def mean(b: Builder, x: Wire, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Wire:
    count = 1
    for dim in dims if dims else range(len(x.shape)):
        count *= x.shape[dim]
    return b.scale(total(b, x, dims, keepdim), 1.0 / count)


# ---- linear maps and products of matrices


@rule(aten.linear.default)
def linear(b: Builder, x: Any, weight: Any, bias: Any = None) -> Wire:
    if isinstance(x, Wire) and isinstance(weight, Constant) and (bias is None or isinstance(bias, Constant)):
        return b.linear(x, weight.tensor.float().t(), None if bias is None else bias.tensor.float())
    turned = b.transpose(weight) if isinstance(weight, Wire) else Constant(weight.tensor.t(), weight.private)
    y = b.matmul(x, turned)
    return y if bias is None else add(b, y, bias)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(b: Builder, x: Any, y: Any) -> Wire:
    return b.matmul(x, y)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def addmm(b: Builder, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Wire:
    if isinstance(x, Wire) and isinstance(y, Constant) and isinstance(bias, Constant) and y.shape[-1:] == bias.shape and len(y.shape) == 2:
        return b.linear(x, y.tensor.float() * alpha, bias.tensor.float() * beta)
    product = b.scale(b.matmul(x, y), alpha)
    if beta == 0:
        return product
    return as_wire(add(b, product, b.scale(bias, beta) if isinstance(bias, Wire) else times(bias, beta)))


@rule(aten.embedding.default)
def embedding(b: Builder, weight: Any, ids: Wire, *_: Any) -> Wire:
    if not isinstance(ids, Wire) or not ids.is_ids:
        raise Unsupported("an embedding of what is not a graph input of token ids")
    return b.emit(Embedding, ids, weight=as_constant(weight).float())


@rule(aten.index.Tensor)
def index(b: Builder, table: Any, indices: Sequence[Any]) -> Wire:
    if isinstance(table, Constant) and len(indices) == 1 and len(table.shape) == 2 and isinstance(indices[0], Wire):
        return embedding(b, table, indices[0])
    raise Unsupported("indexing other than rows of a table by token ids")


# ---- softmax, masks, attention


@rule(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(b: Builder, x: Wire, dim: int, *_: Any) -> Wire:
    dim %= len(x.shape)
    if dim == len(x.shape) - 1:
        return b.emit(Softmax, x)
    return b.transpose(b.emit(Softmax, b.transpose(x, dim, -1)), dim, -1)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(b: Builder, x: Any, mask: Any, value: Any) -> Wire:
    number = float(as_constant(value)) if isinstance(value, Constant) else float(value)
    return b.blend(as_wire(x), as_constant(mask).bool(), number)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(b: Builder, condition: Any, x: Any, y: Any) -> Wire:
    chosen = as_constant(condition).bool()
    if isinstance(x, Wire) and isinstance(y, Wire):
        raise Unsupported("a choice between two private values")
    wire, other, masked = (x, y, ~chosen) if isinstance(x, Wire) else (as_wire(y), x, chosen)
    if isinstance(other, Constant):
        if other.tensor.numel() != 1:
            raise Unsupported("a choice between a private value and a tensor")
        other = float(other.tensor)
    return b.blend(wire, masked, float(other))


@rule(aten.tril.default)
def tril(b: Builder, x: Wire, diagonal: int = 0) -> Wire:
    return b.scale(x, Constant(torch.ones(x.shape[-2:]).tril(diagonal), True))


@rule(aten.triu.default)
def triu(b: Builder, x: Wire, diagonal: int = 0) -> Wire:
    return b.scale(x, Constant(torch.ones(x.shape[-2:]).triu(diagonal), True))


@rule(aten.scaled_dot_product_attention.default)
def attention(
    b: Builder,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Wire:
    q, k, v = as_wire(q), as_wire(k), as_wire(v)
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        raise Unsupported("attention with fewer heads of keys than of queries")
    scores = b.scale(b.matmul(q, b.transpose(k)), q.shape[-1] ** -0.5 if scale is None else scale)  # (..., T, T)
    if is_causal:
        scores = b.mask(scores, torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1))
    if mask is not None:
        tensor = as_constant(mask)
        scores = b.mask(scores, ~tensor) if tensor.dtype == torch.bool else b.shift(scores, Constant(tensor, True))
    return b.matmul(b.emit(Softmax, scores), v)
