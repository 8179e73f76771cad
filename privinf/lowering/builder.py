"""What a rule of the table works with: private values, constants, and the builder that emits nodes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privinf.lowering.draft import Draft, layer_of
from privinf.lowering.node_base import Node, Shape, broadcast
from privinf.lowering.nodes import (
    Add,
    AddConstant,
    Bias,
    Cat,
    Embedding,
    Linear,
    MatMul,
    MulConstant,
    Permute,
    Reshape,
    Scale,
    Select,
    Slice,
)

# A score at or below this has no weight after a softmax, whatever the others are: it marks a mask, not a bias.
MASKED = -9999.0
MAX_COPIES = 64  # a broadcast along an axis is written as this many copies at most


class Unsupported(Exception):
    """This use of an operator has no node; the reason is the message."""


@dataclass(frozen=True)
class Wire:
    """A private value of the graph under construction."""

    key: str
    shape: Shape
    is_ids: bool = False


@dataclass(frozen=True)
class Constant:
    """A tensor known at lowering. `private`: computed from parameters or buffers, so it must not be public."""

    tensor: Tensor
    private: bool

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)


class CausalMask(Node):
    """Only while lowering: scores (..., T, T) with the future masked. A pass lets the softmax that follows absorb it."""


class Builder:
    """Emits nodes for the operator that is being lowered, with the simplifications that need no look ahead."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.path = ""
        self.result_shape: Shape = ()  # of the operator that is being lowered, as the exporter knows it

    # ---- emitting

    def emit(self, kind: type[Node], *inputs: Wire, **values: Any) -> Wire:
        if any(wire.is_ids for wire in inputs) and kind is not Embedding:
            raise Unsupported("arithmetic on token ids")
        label = kind.op or "mask"
        node = kind(f"{self.path}.{label}" if self.path else label, layer_of(self.path), **values)
        key = self.draft.add(node, [wire.key for wire in inputs])
        return Wire(key, self.draft.shapes[key])

    def reshape(self, x: Wire, shape: Sequence[int]) -> Wire:
        """x in another shape; two in a row are one, none where the shape stays."""
        producer = self.draft.producer(x.key)
        while isinstance(producer, Reshape):
            key = self.draft.reads[x.key][0]
            x = Wire(key, self.draft.shapes[key])
            producer = self.draft.producer(x.key)
        return x if tuple(shape) == x.shape else self.emit(Reshape, x, shape=list(shape))

    def permute(self, x: Wire, dims: Sequence[int]) -> Wire:
        """x with axes in another order; two in a row are one, and moving axes of size 1 is a reshape."""
        dims = [dim % len(x.shape) for dim in dims]
        shape = tuple(x.shape[dim] for dim in dims)
        kept = [dim for dim in dims if x.shape[dim] != 1]
        if kept == sorted(kept):
            return self.reshape(x, shape)
        producer = self.draft.producer(x.key)
        if isinstance(producer, Permute):
            key = self.draft.reads[x.key][0]
            return self.permute(Wire(key, self.draft.shapes[key]), [producer.dims[dim] for dim in dims])
        return self.emit(Permute, x, dims=dims)

    def transpose(self, x: Wire, first: int = -2, second: int = -1) -> Wire:
        dims = list(range(len(x.shape)))
        dims[first], dims[second] = dims[second], dims[first]
        return self.permute(x, dims)

    def slice(self, x: Wire, dim: int, start: int, stop: int, step: int = 1) -> Wire:
        dim %= len(x.shape)
        if (start, stop, step) == (0, x.shape[dim], 1):
            return x
        return self.emit(Slice, x, dim=dim, start=start, stop=stop, step=step)

    def select(self, x: Wire, dim: int, index: int) -> Wire:
        dim %= len(x.shape)
        return self.emit(Select, x, dim=dim, index=index % x.shape[dim])

    def expand(self, x: Wire, shape: Sequence[int]) -> Wire:
        """x copied along the axes where it has size 1 and `shape` more."""
        x = self.reshape(x, (1,) * (len(shape) - len(x.shape)) + x.shape)
        for dim, size in enumerate(shape):
            if size not in (-1, x.shape[dim]):
                if size > MAX_COPIES:
                    raise Unsupported(f"a private value copied {size} times")
                x = self.emit(Cat, *[x] * size, dim=dim)
        return x

    def by_rows(self, kind: type[Node], x: Wire, **values: Any) -> Wire:
        """Emit a node that treats each row alike, before a reshape or permutation that keeps the rows rather than after it.

        These so move down until they meet their inverse: exporters wrap matrix products in pairs of them.
        """
        producer = self.draft.producer(x.key)
        if isinstance(producer, Reshape | Permute):
            key = self.draft.reads[x.key][0]
            source = Wire(key, self.draft.shapes[key])
            if isinstance(producer, Permute) and producer.dims[-1] == len(producer.dims) - 1:
                return self.permute(self.by_rows(kind, source, **values), producer.dims)
            if isinstance(producer, Reshape) and source.shape and x.shape and source.shape[-1] == x.shape[-1]:
                y = self.by_rows(kind, source, **values)
                return self.reshape(y, (*x.shape[:-1], y.shape[-1]))
        return self.emit(kind, x, **values)

    # ---- arithmetic

    def scale(self, x: Wire, factor: Constant | float) -> Wire:
        """x times a constant: public if it is a number in the code, private if it comes from the weights."""
        number = as_number(factor)
        if number is not None:
            return x if number == 1.0 else self.by_rows(MulConstant, x, constant=number)
        return self._with_weight(Scale, x, factor)

    def shift(self, x: Wire, term: Constant | float) -> Wire:
        """x plus a constant, which may turn out to be a causal mask."""
        number = as_number(term)
        if number is not None:
            return x if number == 0.0 else self.by_rows(AddConstant, x, constant=number)
        assert isinstance(term, Constant)
        tensor = term.tensor.float()
        masked = tensor <= MASKED
        if bool(masked.any()):
            if not bool((tensor[~masked] != 0).any()):
                return self.mask(self.expand(x, broadcast_shape(x.shape, term.shape)), masked)
            if bool(tensor.isinf().any()) or _is_future(masked):
                raise Unsupported("a mask with other values than 0 and minus infinity")
        return self._with_weight(Bias, x, term)

    def _with_weight(self, kind: type[Node], x: Wire, constant: Constant | float) -> Wire:
        assert isinstance(constant, Constant)
        x = self.expand(x, broadcast_shape(x.shape, constant.shape))
        weight = constant.tensor.float()
        while weight.dim() > len(x.shape) or (weight.dim() > 1 and weight.shape[0] == 1):
            weight = weight[0]  # leading axes of size 1
        emit = self.by_rows if weight.dim() <= 1 else self.emit
        return emit(kind, x, weight=weight)

    def mask(self, x: Wire, masked: Tensor) -> Wire:
        """Scores x (..., T, T) with the masked ones at minus infinity; only the causal mask is known."""
        queries, keys = x.shape[-2:] if len(x.shape) > 1 else (1, 1)
        future = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        if not bool(masked.any()) and (queries, keys) != (1, 1):
            return x
        if queries != keys or not bool((masked == future).all()):
            raise Unsupported("a mask that is not the causal one")
        return self.emit(CausalMask, x)

    def blend(self, x: Wire, masked: Tensor, value: float) -> Wire:
        """x where not masked, else a number."""
        if value <= MASKED:
            return self.mask(self.expand(x, broadcast_shape(x.shape, tuple(masked.shape))), masked)
        x = self.scale(x, Constant((~masked).float(), True))
        return x if value == 0.0 else self.shift(x, Constant(masked.float() * value, True))

    def linear(self, x: Wire, weight: Tensor, bias: Tensor | None = None) -> Wire:
        """x (..., in) @ weight (in, out) + bias (out)."""
        values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return self.by_rows(Linear, x, **values)

    def matmul(self, x: Wire | Constant, y: Wire | Constant) -> Wire:
        """torch.matmul of a private value with a private value or a constant."""
        if len(x.shape) == 1 or len(y.shape) == 1:
            wide_x = unsqueeze(self, x, 0) if len(x.shape) == 1 else x  # (1, K)
            wide_y = unsqueeze(self, y, 1) if len(y.shape) == 1 else y  # (K, 1)
            return self.reshape(self.matmul(wide_x, wide_y), self.matmul_shape(x.shape, y.shape))
        if isinstance(x, Constant):
            return self.transpose(self.matmul(self.transpose(as_wire(y)), Constant(x.tensor.mT, x.private)))
        lead = broadcast_shape(x.shape[:-2], y.shape[:-2])
        if isinstance(y, Constant):
            if y.tensor.numel() == y.shape[-2] * y.shape[-1]:  # one matrix for all
                x = self.reshape(x, (1,) * (len(lead) - len(x.shape[:-2])) + x.shape)
                return self.linear(x, y.tensor.reshape(y.shape[-2:]).float())
            return self._matmul_each(self.expand(x, (*lead, *x.shape[-2:])), y.tensor.expand(*lead, *y.shape[-2:]).float())
        return self.emit(MatMul, self.expand(x, (*lead, *x.shape[-2:])), self.expand(y, (*lead, *y.shape[-2:])))

    def _matmul_each(self, x: Wire, matrices: Tensor) -> Wire:
        """x (..., M, K) @ matrices (..., K, N), a constant matrix for each leading index."""
        shape = (*x.shape[:-1], matrices.shape[-1])
        count = matrices.shape[:-2].numel()
        if count > MAX_COPIES:
            raise Unsupported(f"a batch of {count} different constant matrices")
        x = self.reshape(x, (count, *x.shape[-2:]))
        flat = matrices.reshape(count, *matrices.shape[-2:])
        rows = [self.linear(self.slice(x, 0, i, i + 1), flat[i]) for i in range(count)]
        return self.reshape(self.emit(Cat, *rows, dim=0) if count > 1 else rows[0], shape)

    def matmul_shape(self, x: Shape, y: Shape) -> Shape:
        return tuple(torch.matmul(torch.empty(x, device="meta"), torch.empty(y, device="meta")).shape)

    def total(self, x: Wire, dim: int) -> Wire:
        """The sum over one axis, which stays with size 1: halves are added to each other, which moves no bytes."""
        while x.shape[dim] > 1:
            size = x.shape[dim]
            half = size // 2
            y = self.emit(Add, self.slice(x, dim, 0, half), self.slice(x, dim, half, 2 * half))
            x = y if size % 2 == 0 else self.emit(Cat, y, self.slice(x, dim, size - 1, size), dim=dim % len(x.shape))
        return x


def _is_future(masked: Tensor) -> bool:
    """Whether (..., T, T) masks what comes after each position. Large numbers anywhere else are no mask, but a term like any other."""
    if masked.dim() < 2 or masked.shape[-2] != masked.shape[-1]:
        return False
    return bool((masked == torch.ones(masked.shape[-2:], dtype=torch.bool).triu(1)).all())


def broadcast_shape(*shapes: Shape) -> Shape:
    return broadcast(Node("broadcast"), *shapes) if any(shapes) else ()


def as_number(value: Constant | float) -> float | None:
    """The number that a public constant is, if it is one; None for tensors and for what comes from weights."""
    if not isinstance(value, Constant):
        return float(value)
    return None if value.private or value.tensor.numel() != 1 else float(value.tensor)


def as_wire(value: Any) -> Wire:
    if not isinstance(value, Wire):
        raise Unsupported("a constant where a private value is expected")
    return value


def as_constant(value: Any) -> Tensor:
    if not isinstance(value, Constant):
        raise Unsupported("a private value where a constant is expected")
    return value.tensor


def unsqueeze(b: Builder, x: Wire | Constant, dim: int) -> Wire | Constant:
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return Constant(x.tensor.reshape(shape), x.private) if isinstance(x, Constant) else b.reshape(x, shape)


def times(value: Constant | float, factor: float) -> Constant | float:
    """A constant operand times a number (for `alpha` and `beta` arguments)."""
    return Constant(value.tensor * factor, value.private) if isinstance(value, Constant) else value * factor
