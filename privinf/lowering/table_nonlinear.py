"""The table's rules for the nonlinear operators of the ladder's baselines; see `table`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from privinf.lowering.builder import Builder, Constant, Unsupported, Wire
from privinf.lowering.nonlinear_nodes import Gelu, LayerNorm, Relu
from privinf.lowering.table import rule

aten = torch.ops.aten


@rule(aten.relu.default)
def relu(b: Builder, x: Wire) -> Wire:
    return b.by_rows(Relu, x)


@rule(aten.gelu.default)
def gelu(b: Builder, x: Wire, *, approximate: str = "none") -> Wire:
    return b.by_rows(Gelu, x, form="tanh" if approximate == "tanh" else "erf")


@rule(aten.layer_norm.default)
def layer_norm(b: Builder, x: Wire, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Wire:
    if len(shape) != 1:
        raise Unsupported("a LayerNorm over more than the last axis")
    y = b.by_rows(LayerNorm, x, epsilon=eps)
    if isinstance(weight, Constant):
        y = b.scale(y, weight)
    return b.shift(y, bias) if isinstance(bias, Constant) else y
