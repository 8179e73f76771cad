"""The kinds of nodes of a lowered graph that compute; those that only move elements are in `layout_nodes`, re-exported here.

Shapes: B batch, T positions, d width, H heads, d_k = d / H, V vocabulary. `...` is any number of leading axes.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from privinf.crypten_adapter import stock
from privinf.lowering.layout_nodes import Cat, LastPosition, Permute, Reshape, Select, Slice
from privinf.lowering.node_base import NODE_KINDS, Node, Shape, broadcast
from privinf.lowering.nonlinear_nodes import Gelu, LayerNorm, Relu

__all__ = [
    "NODE_KINDS",
    "Add",
    "AddConstant",
    "Bias",
    "Cat",
    "CausalAttention",
    "Embedding",
    "Gelu",
    "LastPosition",
    "LayerNorm",
    "Linear",
    "MatMul",
    "Mul",
    "MulConstant",
    "Node",
    "Permute",
    "PositionBias",
    "Relu",
    "Reshape",
    "Scale",
    "Select",
    "Shape",
    "Slice",
    "Softmax",
    "Sub",
    "broadcast",
]

# Stock CrypTen approximates exp(x) by (1 + x/256)^256, which explodes below -512: a masked score must stay moderate, and
# exp(-60) is nothing beside any exp(0).
CRYPTEN_MASK = -60.0


class Embedding(Node):
    """Rows of a private table: ids (B, T) -> (B, T, d), or (...) -> (..., d). weight (V, d). Stock CrypTen: one-hot (..., V)."""

    op = "embedding"
    required = ("weight",)

    def check(self) -> None:
        if len(self.parameter_shapes["weight"]) != 2:
            raise self.fail("weight must be (V, d)")

    def output_shape(self, *shapes: Shape) -> Shape:
        return (*shapes[0], self.parameter_shapes["weight"][1])

    def generic(self, *inputs: Any) -> Any:
        (ids,) = inputs
        weight = self.value("weight")
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            return weight[ids]
        return ids.matmul(weight)


class PositionBias(Node):
    """x (B, T, d) plus rows offset .. offset + T of a private table, weight (n_positions, d); `offset` is set at run."""

    op = "position_bias"
    required = ("weight",)
    offset: int = 0

    def check(self) -> None:
        if len(self.parameter_shapes["weight"]) != 2:
            raise self.fail("weight must be (n_positions, d)")

    def output_shape(self, *shapes: Shape) -> Shape:
        rows, width = self.parameter_shapes["weight"]
        shape = shapes[0]
        if len(shape) != 3 or shape[2] != width or shape[1] > rows:
            raise self.fail(f"input {list(shape)} does not fit a table of {rows} positions of width {width}")
        return shape

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.add(self.value("weight")[self.offset : self.offset + x.size(1)])


class Linear(Node):
    """x (..., in) -> x W + b (..., out). weight (in, out), bias (out) or none: both private.

    `tied_to` names the Embedding whose table (out, in) is this weight, transposed: one weight, encoded and masked once.
    """

    op = "linear"
    required = ("weight",)
    optional = ("bias",)
    tied_to: str | None

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        tied_to: str | None = None

    def check(self) -> None:
        weight, bias = self.parameter_shapes["weight"], self.parameter_shapes.get("bias")
        if len(weight) != 2 or (bias is not None and bias != weight[1:]):
            raise self.fail("weight must be (in, out) and bias (out)")

    def output_shape(self, *shapes: Shape) -> Shape:
        rows, columns = self.parameter_shapes["weight"]
        if not shapes[0] or shapes[0][-1] != rows:
            raise self.fail(f"input {list(shapes[0])} does not end in {rows}")
        return (*shapes[0][:-1], columns)

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        y = x.matmul(self.value("weight"))
        bias = self.maybe("bias")
        return y if bias is None else y.add(bias)


class Scale(Node):
    """x (...) times a private tensor that broadcasts into it. weight: any shape of at most x's rank."""

    op = "scale"
    required = ("weight",)

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = broadcast(self, shapes[0], self.parameter_shapes["weight"])
        if shape != shapes[0]:
            raise self.fail(f"weight does not broadcast into {list(shapes[0])}")
        return shape

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.mul(self.value("weight"))


class Bias(Scale):
    """x (...) plus a private tensor that broadcasts into it. weight: any shape of at most x's rank."""

    op = "bias"

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.add(self.value("weight"))


class MulConstant(Node):
    """x times a public constant."""

    op = "mul_constant"
    constant: float

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        constant: float

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.mul(self.constant)


class AddConstant(MulConstant):
    """x plus a public constant."""

    op = "add_constant"

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.add(self.constant)


class Add(Node, stock.Add):  # type: ignore[misc]
    """x + y, two private values whose shapes broadcast."""

    op = "add"
    arity = 2

    def output_shape(self, *shapes: Shape) -> Shape:
        return broadcast(self, *shapes)

    def generic(self, *inputs: Any) -> Any:
        return stock.Add.forward(self, inputs)


class Sub(Add, stock.Sub):  # type: ignore[misc]
    """x - y, two private values whose shapes broadcast."""

    op = "sub"

    def generic(self, *inputs: Any) -> Any:
        return stock.Sub.forward(self, inputs)


class Mul(Add, stock.Mul):  # type: ignore[misc]
    """Elementwise x y, two private values whose shapes broadcast; x may be y."""

    op = "mul"

    def generic(self, *inputs: Any) -> Any:
        return stock.Mul.forward(self, inputs)


class MatMul(Node, stock.MatMul):  # type: ignore[misc]
    """(..., M, K) times (..., K, N) -> (..., M, N), two private values with equal leading axes (rank 2 and above)."""

    op = "matmul"
    arity = 2

    def output_shape(self, *shapes: Shape) -> Shape:
        x, y = shapes
        if len(x) < 2 or x[:-2] != y[:-2] or x[-1] != y[-2]:
            raise self.fail(f"shapes {list(x)} and {list(y)} have no matrix product")
        return (*x[:-1], y[-1])

    def generic(self, *inputs: Any) -> Any:
        return stock.MatMul.forward(self, inputs)


def last_axis_softmax(scores: Any, causal: bool) -> Any:
    """Softmax over the last axis of (..., T, T), over positions up to the query's own where causal."""
    if causal:
        size = scores.size(-1)
        future = torch.ones(size, size, dtype=torch.bool).triu(1)  # (T, T)
        if isinstance(scores, torch.Tensor):
            scores = scores.masked_fill(future.to(scores.device), float("-inf"))
        else:
            scores = scores.add(future * CRYPTEN_MASK)
    return scores.softmax(-1)


class Softmax(Node):
    """Softmax over the last axis of (...); causal: of (..., T, T), each row over the positions up to its own."""

    op = "softmax"
    causal: bool

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        causal: bool = False

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if not shape or (self.causal and (len(shape) < 2 or shape[-1] != shape[-2])):
            raise self.fail(f"no {'causal ' if self.causal else ''}softmax over {list(shape)}")
        return shape

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return last_axis_softmax(x, self.causal)


class CausalAttention(Node):
    """The causal attention of all heads as one region: q, k, v side by side (B, T, 3 d) -> heads merged (B, T, d).

    Query i of head h is multiplied by inverse_temperature[h, i], which already holds 1 / sqrt(d_k), where the model has a
    temperature: a private parameter (H, n_positions). Otherwise by the public `scale`; the lowering leaves it at 1, since it folds
    1 / sqrt(d_k) into the private columns that make q, or multiplies q before the node where no linear map makes it.
    """

    op = "attention"
    optional = ("inverse_temperature",)
    heads: int
    head_dim: int
    scale: float
    last_query: bool

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        heads: int
        head_dim: int
        scale: float = 1.0
        last_query: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def check(self) -> None:
        temperature = self.parameter_shapes.get("inverse_temperature")
        if self.heads < 1 or self.head_dim < 1 or (temperature is not None and (len(temperature) != 2 or temperature[0] != self.heads)):
            raise self.fail("inverse_temperature must be (H, n_positions)")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        temperature = self.parameter_shapes.get("inverse_temperature")
        if len(shape) != 3 or shape[2] != 3 * self.width or (temperature is not None and shape[1] > temperature[1]):
            raise self.fail(f"input {list(shape)} does not hold q, k, v of {self.heads} heads of {self.head_dim}")
        return (shape[0], 1 if self.last_query else shape[1], self.width)

    def split_heads(self, qkv: Any) -> tuple[Any, Any, Any]:
        """(B, T, 3 d) -> q, k, v, each (B, H, T, d_k), not yet scaled."""
        batch, length = qkv.size(0), qkv.size(1)
        parts = (qkv[:, :, part * self.width : (part + 1) * self.width] for part in range(3))  # (B, T, d)
        q, k, v = (part.reshape(batch, length, self.heads, self.head_dim).permute(0, 2, 1, 3) for part in parts)
        return q, k, v

    def scale_query(self, q: Any) -> Any:
        """q (B, H, T, d_k) with the temperatures and the constant applied."""
        temperature = self.maybe("inverse_temperature")
        if temperature is not None:
            q = q.mul(temperature[:, : q.size(2)].unsqueeze(-1))  # (H, T, 1)
        return q if self.scale == 1.0 else q.mul(self.scale)

    def generic(self, *inputs: Any) -> Any:
        (qkv,) = inputs
        q, k, v = self.split_heads(qkv)
        scores = self.scale_query(q).matmul(k.transpose(2, 3))  # (B, H, T, T)
        mixed = last_axis_softmax(scores, causal=True).matmul(v)  # (B, H, T, d_k)
        merged = mixed.permute(0, 2, 1, 3).reshape(qkv.size(0), qkv.size(1), self.width)  # (B, T, d)
        return merged[:, qkv.size(1) - 1 :] if self.last_query else merged
