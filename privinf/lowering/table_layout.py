"""The rules of operators that only move elements, and of those that do nothing here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from privinf.lowering.builder import Builder, Constant, Unsupported, Wire, as_wire
from privinf.lowering.nodes import Cat, LastPosition
from privinf.lowering.table import rule

aten = torch.ops.aten


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
def identity(b: Builder, x: Wire, *_: Any, **__: Any) -> Wire:
    return x


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
)
def reshape(b: Builder, x: Wire, *_: Any, **__: Any) -> Wire:
    """All of these keep the elements in row-major order, so the shape of the result says everything."""
    if x.is_ids and b.result_shape == x.shape:
        return x
    return b.reshape(x, b.result_shape)


@rule(aten.permute.default)
def permute(b: Builder, x: Wire, dims: Sequence[int]) -> Wire:
    return b.permute(x, dims)


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
def transpose(b: Builder, x: Wire, first: int, second: int) -> Wire:
    return b.transpose(x, first, second)


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default)
def matrix_transpose(b: Builder, x: Wire) -> Wire:
    if len(x.shape) < 2:
        return x
    return b.transpose(x)


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(b: Builder, x: Wire, source: Any, target: Any) -> Wire:
    source, target = ([value] if isinstance(value, int) else value for value in (source, target))
    rank = len(x.shape)
    place = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in place.values())
    return b.permute(x, [place[dim] if dim in place else next(rest) for dim in range(rank)])


@rule(aten.slice.Tensor)
def slice_(b: Builder, x: Wire, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Wire:
    size = x.shape[dim]
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    if start >= stop:
        raise Unsupported("an empty slice")
    return b.slice(x, dim, start, stop, step)


@rule(aten.narrow.default)
def narrow(b: Builder, x: Wire, dim: int, start: int, length: int) -> Wire:
    return slice_(b, x, dim, start, start + length)


@rule(aten.select.int)
def select(b: Builder, x: Wire, dim: int, index: int) -> Wire:
    if index == -1 and dim == 1 and len(x.shape) > 2:
        return b.emit(LastPosition, x)
    return b.select(x, dim, index)


@rule(aten.split.Tensor)
def split(b: Builder, x: Wire, size: int, dim: int = 0) -> tuple[Wire, ...]:
    end = x.shape[dim]
    return tuple(b.slice(x, dim, start, min(start + size, end)) for start in range(0, end, size))


@rule(aten.split_with_sizes.default, aten.split.sizes)
def split_with_sizes(b: Builder, x: Wire, sizes: Sequence[int], dim: int = 0) -> tuple[Wire, ...]:
    parts, start = [], 0
    for size in sizes:
        parts.append(b.slice(x, dim, start, start + size))
        start += size
    return tuple(parts)


@rule(aten.chunk.default)
def chunk(b: Builder, x: Wire, chunks: int, dim: int = 0) -> tuple[Wire, ...]:
    return split(b, x, -(-x.shape[dim] // chunks), dim)


@rule(aten.unbind.int)
def unbind(b: Builder, x: Wire, dim: int = 0) -> tuple[Wire, ...]:
    return tuple(b.select(x, dim, index) for index in range(x.shape[dim]))


@rule(aten.cat.default, aten.concat.default)
def cat(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Wire:
    wires = [as_wire(value) for value in tensors if not (isinstance(value, Constant) and value.tensor.numel() == 0)]
    return wires[0] if len(wires) == 1 else b.emit(Cat, *wires, dim=dim % len(wires[0].shape))


@rule(aten.stack.default)
def stack(b: Builder, tensors: Sequence[Any], dim: int = 0) -> Wire:
    wires = [as_wire(value) for value in tensors]
    shape = wires[0].shape
    dim %= len(shape) + 1
    return cat(b, [b.reshape(wire, (*shape[:dim], 1, *shape[dim:])) for wire in wires], dim)


@rule(aten.expand.default, aten.expand_as.default)
def expand(b: Builder, x: Wire, *_: Any, **__: Any) -> Wire:
    return b.expand(x, b.result_shape)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(b: Builder, x: Wire, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Wire:
    if dim is None:
        x, dim = b.reshape(x, (torch.Size(x.shape).numel(),)), 0
    dim %= len(x.shape)
    lead, rest = x.shape[: dim + 1], x.shape[dim + 1 :]
    return b.reshape(b.expand(b.reshape(x, (*lead, 1, *rest)), (*lead, repeats, *rest)), b.result_shape)


@rule(aten.repeat.default)
def repeat(b: Builder, x: Wire, repeats: Sequence[int]) -> Wire:
    x = b.reshape(x, (1,) * (len(repeats) - len(x.shape)) + x.shape)
    for dim, count in enumerate(repeats):
        if count > 1:
            x = b.emit(Cat, *[x] * count, dim=dim)
    return x
