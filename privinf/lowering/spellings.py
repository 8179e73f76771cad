"""ATen operators that are only other spellings: of the operators in `privinf.ops`, whose own rules stand there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Constant, Unsupported, Value, as_constant, as_value, aten, broadcast_shape, rule
from privinf.ops.add import Add
from privinf.ops.bias import shift
from privinf.ops.cat import Cat, cat, expand
from privinf.ops.mul import Mul
from privinf.ops.permute import permute, transpose
from privinf.ops.reshape import reshape
from privinf.ops.scale import scale
from privinf.ops.select import pick
from privinf.ops.slice import slice_, take
from privinf.ops.softmax import MASKED, mask

# ---- nothing at all


@rule(
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)
def identity(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """x itself: copies, casts between float types, dropout at inference."""
    return x


# ---- arithmetic


@rule(aten.div.Tensor, aten.div.Scalar)
def div(b: Builder, x: Any, y: Any) -> Value:
    """x / y by a public number or tensor, as a product."""
    if isinstance(y, Value):
        raise Unsupported("division by a private value")
    if isinstance(y, Constant):
        return scale(b, as_value(x), Constant(1.0 / y.tensor.float(), y.private))
    return scale(b, as_value(x), 1.0 / y)


@rule(aten.neg.default)
def neg(b: Builder, x: Value) -> Value:
    """-x."""
    return scale(b, x, -1.0)


@rule(aten.pow.Tensor_Scalar)
def power(b: Builder, x: Value, exponent: float) -> Value:
    """x^2 and x^3, by products; Unsupported for other powers."""
    if exponent == 1:
        return x
    if exponent not in (2, 3):
        raise Unsupported(f"the power {exponent} of a private value")
    y = b.emit(Mul, x, x)
    return y if exponent == 2 else b.emit(Mul, y, x)


@rule(aten.square.default)
def square(b: Builder, x: Value) -> Value:
    """x^2."""
    return b.emit(Mul, x, x)


@rule(aten.sum.dim_IntList, aten.sum.default)
def total(b: Builder, x: Value, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    """The sum over some axes, or all."""
    for dim in dims if dims else range(len(x.shape)):
        x = total_of_axis(b, x, dim)
    return reshape(b, x, b.result_shape)


def total_of_axis(b: Builder, x: Value, dim: int) -> Value:
    """The sum over one axis, which stays with size 1: halves are added to each other, which moves no bytes."""
    while x.shape[dim] > 1:
        size = x.shape[dim]
        half = size // 2
        y = b.emit(Add, take(b, x, dim, 0, half), take(b, x, dim, half, 2 * half))
        x = y if size % 2 == 0 else b.emit(Cat, y, take(b, x, dim, size - 1, size), dim=dim % len(x.shape))
    return x


@rule(aten.mean.dim, aten.mean.default)
def mean(b: Builder, x: Value, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    """The sum, times one over the number of elements."""
    count = 1
    for dim in dims if dims else range(len(x.shape)):
        count *= x.shape[dim]
    return scale(b, total(b, x, dims, keepdim), 1.0 / count)


# ---- masks


def blend(b: Builder, x: Value, masked: Tensor, value: float) -> Value:
    """x where not masked, else a number."""
    if value <= MASKED:
        return mask(b, expand(b, x, broadcast_shape(x.shape, tuple(masked.shape))), masked)
    x = scale(b, x, Constant((~masked).float(), True))
    return x if value == 0.0 else shift(b, x, Constant(masked.float() * value, True))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(b: Builder, x: Any, masked: Any, value: Any) -> Value:
    """x, but a number where a public mask says so."""
    number = float(as_constant(value)) if isinstance(value, Constant) else float(value)
    return blend(b, as_value(x), as_constant(masked).bool(), number)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(b: Builder, condition: Any, x: Any, y: Any) -> Value:
    """One of a private value and a public number, by a public condition."""
    chosen = as_constant(condition).bool()
    if isinstance(x, Value) and isinstance(y, Value):
        raise Unsupported("a choice between two private values")
    wire, other, masked = (x, y, ~chosen) if isinstance(x, Value) else (as_value(y), x, chosen)
    if isinstance(other, Constant):
        if other.tensor.numel() != 1:
            raise Unsupported("a choice between a private value and a tensor")
        other = float(other.tensor)
    return blend(b, wire, masked, float(other))


@rule(aten.tril.default)
def tril(b: Builder, x: Value, diagonal: int = 0) -> Value:
    """x up to a diagonal, zeros above it."""
    return scale(b, x, Constant(torch.ones(x.shape[-2:]).tril(diagonal), True))


@rule(aten.triu.default)
def triu(b: Builder, x: Value, diagonal: int = 0) -> Value:
    """x from a diagonal on, zeros below it."""
    return scale(b, x, Constant(torch.ones(x.shape[-2:]).triu(diagonal), True))


# ---- layout


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default)
def matrix_transpose(b: Builder, x: Value) -> Value:
    """The last two axes exchanged."""
    return x if len(x.shape) < 2 else transpose(b, x)


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(b: Builder, x: Value, source: Any, target: Any) -> Value:
    """Axes moved, the others in their order."""
    source, target = ([value] if isinstance(value, int) else value for value in (source, target))
    rank = len(x.shape)
    place = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in place.values())
    return permute(b, x, [place[dim] if dim in place else next(rest) for dim in range(rank)])


@rule(aten.narrow.default)
def narrow(b: Builder, x: Value, dim: int, start: int, length: int) -> Value:
    """`length` elements of an axis from `start`."""
    return slice_(b, x, dim, start, start + length)


@rule(aten.split.Tensor)
def split(b: Builder, x: Value, size: int, dim: int = 0) -> tuple[Value, ...]:
    """Pieces of `size` along an axis, the last one shorter."""
    end = x.shape[dim]
    return tuple(take(b, x, dim, start, min(start + size, end)) for start in range(0, end, size))


@rule(aten.split_with_sizes.default, aten.split.sizes)
def split_with_sizes(b: Builder, x: Value, sizes: Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    """Pieces of these sizes along an axis."""
    parts, start = [], 0
    for size in sizes:
        parts.append(take(b, x, dim, start, start + size))
        start += size
    return tuple(parts)


@rule(aten.chunk.default)
def chunk(b: Builder, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    """`chunks` pieces along an axis, or fewer."""
    return split(b, x, -(-x.shape[dim] // chunks), dim)


@rule(aten.unbind.int)
def unbind(b: Builder, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Every element of an axis, without that axis."""
    return tuple(pick(b, x, dim, index) for index in range(x.shape[dim]))


@rule(aten.stack.default)
def stack(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Value:
    """Tensors side by side on a new axis."""
    wires = [as_value(value) for value in tensors]
    shape = wires[0].shape
    dim %= len(shape) + 1
    return cat(b, [reshape(b, wire, (*shape[:dim], 1, *shape[dim:])) for wire in wires], dim)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(b: Builder, x: Value, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Value:
    """Every element of an axis several times in a row."""
    if dim is None:
        x, dim = reshape(b, x, (torch.Size(x.shape).numel(),)), 0
    dim %= len(x.shape)
    lead, rest = x.shape[: dim + 1], x.shape[dim + 1 :]
    return reshape(b, expand(b, reshape(b, x, (*lead, 1, *rest)), (*lead, repeats, *rest)), b.result_shape)


@rule(aten.repeat.default)
def repeat(b: Builder, x: Value, repeats: Sequence[int]) -> Value:
    """The tensor several times along each axis."""
    x = reshape(b, x, (1,) * (len(repeats) - len(x.shape)) + x.shape)
    for dim, count in enumerate(repeats):
        if count > 1:
            x = b.emit(Cat, *[x] * count, dim=dim)
    return x
