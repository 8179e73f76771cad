"""The nonlinear kinds of the ladder's baselines: LayerNorm without its affine part, GELU and ReLU."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch

from privinf.lowering.node_base import Node


class LayerNorm(Node):
    """(x - mean) / sqrt(variance + epsilon) over the last axis of (..., d); scale and shift are nodes of their own, or folded."""

    op = "layer_norm"
    server_only = ("epsilon",)  # a folded checkpoint's is divided by the square of its betas, which are weights
    epsilon: float

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        epsilon: float = 1e-5

    def check(self) -> None:
        if not 0 < self.epsilon < 1:
            raise self.fail("epsilon must lie between 0 and 1")

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        centred = x.sub(x.mean(-1, keepdim=True))
        variance = centred.square().mean(-1, keepdim=True).add(self.epsilon)
        return centred.mul(variance.rsqrt() if isinstance(x, torch.Tensor) else variance.inv_sqrt())


class Gelu(Node):
    """GELU; form `tanh` is GPT-2's, `erf` the exact one."""

    op = "gelu"
    form: str

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        form: Literal["tanh", "erf"] = "tanh"

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        if isinstance(x, torch.Tensor):
            return torch.nn.functional.gelu(x, approximate="tanh" if self.form == "tanh" else "none")
        if self.form == "erf":
            return x.mul(x.div(2**0.5).erf().add(1)).div(2)
        inner = x.add(x.mul(x).mul(x).mul(0.044715)).mul((2 / torch.pi) ** 0.5)
        return x.mul(inner.tanh().add(1)).div(2)


class Relu(Node):
    """max(x, 0)."""

    op = "relu"

    def generic(self, *inputs: Any) -> Any:
        (x,) = inputs
        return x.relu()
