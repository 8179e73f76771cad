"""The ladder's blocks with ReLU in place of the softmax: attention weights are ReLU of the scores over the number of visible keys.

Source: Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", arXiv 2309.08586; for all else see `privinf.models.aero`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from privinf.models.aero import Aero, AeroConfig, AeroModel, Attention, Block
from privinf.models.base import Activations
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


class ReluAttention(Attention):
    """Causal attention with relu(q k^T / sqrt(d_k)) / length in place of a softmax."""

    def forward(self, x: Tensor, future: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """As `Attention.forward`; entropies of a trace are those of weights that are divided by their sum."""
        batch, tokens, width = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 d)
        if self.training or trace is not None:
            q, k, v = qkv.reshape(batch, tokens, 3, self.n_head, self.head_width).permute(2, 0, 3, 1, 4)  # each (B, H, T, d_k)
            q = self.scaled_queries(q, 0, tokens)
            weights = mean_weights(q @ k.transpose(2, 3))  # (B, H, T, T)
            if trace is not None:
                trace.queries.append(q)
                trace.keys.append(k)
            if trace is not None and trace.keep_attention:
                trace.attention.append(weights / (weights.sum(-1, keepdim=True) + SMALL))
            y = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        else:  # one operator where a graph is made of it
            scale = self.scale
            if scale is not None:
                qkv = torch.cat([qkv[..., :width] * scale, qkv[..., width:]], -1)
            y = torch.ops.privinf.relu_attention(qkv, self.n_head)
        out: Tensor = self.c_proj(y[:, -1:] if last_only else y)
        return out


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
