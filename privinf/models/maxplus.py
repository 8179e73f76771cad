"""The ladder's blocks with max-plus (tropical) products: as the layer between the FFN's two matrices, in attention, or both.

Sources: Zhang et al., "Max-plus Operators Applied to Filter Selection and Model Pruning in Neural Networks", arXiv 1903.08072: a max-plus
layer after a linear one; Hashemi et al., "Tropical Attention", arXiv 2505.17190, for attention of that kind. All else is as in
`privinf.models.aero`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from privinf.models.aero import Aero, AeroConfig, AeroModel, Attention, Block, FeedForward
from privinf.models.base import Activations
from protocols.max_plus import tropical, tropical_mixed, tropical_scores


class MaxPlusConfig(AeroConfig):
    """The ladder's fields, with an FFN and an attention that may be max-plus; `n_inner` is `n_embd` where it is not given."""

    model_type: Literal["maxplus"]  # type: ignore[assignment]
    ffn: Literal["maxplus", "fused"] = "maxplus"  # type: ignore[assignment]
    attention: Literal["maxplus", "softmax"] = "maxplus"

    @model_validator(mode="after")
    def _is_max_plus(self) -> MaxPlusConfig:
        if self.attention == "maxplus" and self.attn_temperature:
            raise ValueError("attn_temperature: max-plus attention has none")
        if self.attention == "softmax" and self.ffn == "fused":
            raise ValueError("attention: without a max-plus layer this is a network of the ladder")
        return self

    @property
    def inner_width(self) -> int:
        """The width of the max-plus layer, of its input and of its output."""
        return self.n_inner or self.n_embd

    @property
    def variant(self) -> str:
        """`MP+MP` has both, `SM+MP` the layer alone, `MP+FuFFN` attention alone; `+LN` and `Sc` as on the ladder."""
        attention = "MP" if self.attention == "maxplus" else "SM(t)" if self.attn_temperature else "SM"
        ffn = ("Sc" if self.ffn_scaled else "") + ("MP" if self.ffn == "maxplus" else "FuFFN")
        removed = f"_i{len(self.ffn_removed)}" if self.ffn_removed else ""
        return "+".join([attention, *(["LN"] if self.norm == "layernorm" else []), ffn]) + removed


class MaxPlusAttention(Attention):
    """Causal attention by max-plus products: y_i = max_j (max_c (q_ic + k_jc) + v_j)."""

    def forward(self, x: Tensor, future: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """As `Attention.forward`; there are no weights, and a trace has the softmax of the scores in their place."""
        batch, tokens, width = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 d)
        if self.training or trace is not None:
            q, k, v = qkv.reshape(batch, tokens, 3, self.n_head, self.head_width).permute(2, 0, 3, 1, 4)  # each (B, H, T, d_k)
            q = self.scaled_queries(q, 0, tokens)
            scores = tropical_scores(q, k)  # (B, H, T, T)
            if trace is not None:
                trace.queries.append(q)
                trace.keys.append(k)
            if trace is not None and trace.keep_attention:
                trace.attention.append(scores.masked_fill(future[:tokens, :tokens], float("-inf")).softmax(-1))
            y = tropical_mixed(scores, v).transpose(1, 2).reshape(batch, tokens, width)
        else:  # one operator where a graph is made of it
            if self.scale is not None:
                qkv = torch.cat([qkv[..., :width] * self.scale, qkv[..., width:]], -1)
            y = torch.ops.privinf.max_plus_attention(qkv, self.n_head)
        out: Tensor = self.c_proj(y[:, -1:] if last_only else y)
        return out


class MaxPlusFeedForward(FeedForward):
    """Two matrices with a max-plus layer between them."""

    def __init__(self, config: AeroConfig) -> None:
        super().__init__(config)
        self.tropical = nn.Parameter(torch.zeros(config.inner_width, config.inner_width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d), without the residual."""
        y = self.first(x)  # (B, T, inner)
        y = tropical(y, self.tropical) if self.training else torch.ops.privinf.max_plus(y, self.tropical)
        out: Tensor = self.last(y, None if self.alpha is None else 1 / self.alpha)
        return out


class MaxPlusModel(AeroModel):
    """A network of the ladder with these."""

    def __init__(self, config: MaxPlusConfig) -> None:
        super().__init__(config)
        for block in self.h:
            assert isinstance(block, Block)
            if config.attention == "maxplus":
                block.attn = MaxPlusAttention(config)
            if config.ffn == "maxplus" and block.mlp is not None:
                block.mlp = MaxPlusFeedForward(config)


class MaxPlus(Aero):
    """Our own checkpoints, as the ladder's."""

    model_type = "maxplus"
    config = MaxPlusConfig
    decoder = MaxPlusModel
