"""A linear map of two values with one private weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import crypten_module
from privinf.graph.node import Shape
from privinf.ops.linear import Linear


class JointLinear(Linear):
    """x (..., n) and y (..., m), side by side -> (x | y) W + b (..., out). weight (n + m, out).

    A linear map of a sum x + y M is one of both, so that it need not wait until the sum is there (`privinf.lowering.residual`).
    """

    op = "joint_linear"
    arity = 2
    reads_stream = True

    def output_shape(self, *shapes: Shape) -> Shape:
        first, second = shapes
        if not first or first[:-1] != second[:-1]:
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} do not line up along the last axis")
        return super().output_shape((*first[:-1], first[-1] + second[-1]))

    def generic(self, x: Any, *others: Any) -> Any:
        both = [x, *others]
        return super().generic(torch.cat(both, -1) if isinstance(x, Tensor) else crypten_module().cat(both, dim=x.dim() - 1))
