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

from privinf.models.aero import Aero, AeroConfig, AeroModel, Block, FeedForward
from privinf.models.attention import OperatorAttention
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


class MaxPlusAttention(OperatorAttention):
    """Causal attention by max-plus products: y_i = max_j (max_c (q_ic + k_jc) + v_j)."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor, kept: list[Tensor] | None) -> Tensor:
        """As there; it has no weights, and what is kept is the softmax of the scores in their place."""
        scores = tropical_scores(q, k)  # (B, H, T, T)
        if kept is not None:
            kept.append(scores.masked_fill(future, float("-inf")).softmax(-1))
        found: Tensor = tropical_mixed(scores, v)
        return found

    def operator(self, qkv: Tensor) -> Tensor:
        """As there."""
        found: Tensor = torch.ops.privinf.max_plus_attention(qkv, self.n_head)
        return found


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
