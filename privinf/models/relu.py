"""The ladder's blocks with ReLU in place of the softmax: attention weights are ReLU of the scores over the number of visible keys.

Source: Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", arXiv 2309.08586; for all else see `privinf.models.aero`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from privinf.models.aero import Aero, AeroConfig, AeroModel, Block
from privinf.models.attention import OperatorAttention
from protocols.relu_attention import mean_weights

SMALL = 1e-6


class ReluConfig(AeroConfig):
    """The ladder's fields; no temperature, of which a ReLU would make a scale that the weights have."""

    model_type: Literal["relu"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _no_temperature(self) -> ReluConfig:
        if self.attn_temperature:
            raise ValueError("attn_temperature: attention with ReLU has none")
        return self

    @property
    def variant(self) -> str:
        """The ladder's name with `RA` in place of `SM`: `RA+FuFFN` has ReLU alone, and in attention only."""
        return "RA" + super().variant.removeprefix("SM")


class ReluAttention(OperatorAttention):
    """Causal attention with relu(q k^T / sqrt(d_k)) / length in place of a softmax."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor, kept: list[Tensor] | None) -> Tensor:
        """As there; what is kept are the weights over their sum."""
        weights = mean_weights(q @ k.transpose(2, 3))  # (B, H, T, T)
        if kept is not None:
            kept.append(weights / (weights.sum(-1, keepdim=True) + SMALL))
        return weights @ v

    def operator(self, qkv: Tensor) -> Tensor:
        """As there."""
        found: Tensor = torch.ops.privinf.relu_attention(qkv, self.n_head)
        return found


class ReluModel(AeroModel):
    """A network of the ladder with that attention."""

    def __init__(self, config: ReluConfig) -> None:
        super().__init__(config)
        for block in self.h:
            assert isinstance(block, Block)
            block.attn = ReluAttention(config)


class Relu(Aero):
    """Our own checkpoints, as the ladder's."""

    model_type = "relu"
    config = ReluConfig
    decoder = ReluModel
    adds_up = True
