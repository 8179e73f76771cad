"""Attention of the ladder's blocks without a softmax, which is one operator where a graph is made of it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from privinf.models.aero import Attention
from privinf.models.base import Activations


class OperatorAttention(Attention):
    """Causal attention of which a family says two things: `mixed` in plain torch, and `operator` in a graph."""

    @abstractmethod
    def mixed(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor, kept: list[Tensor] | None) -> Tensor:
        """Each (B, H, T, d_k), q already scaled, future (T, T) -> (B, H, T, d_k); `kept` gets weights (B, H, T, T) whose rows sum to 1."""

    @abstractmethod
    def operator(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 d), q already scaled -> (B, T, d)."""

    def forward(self, x: Tensor, future: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """As `Attention.forward`."""
        batch, tokens, width = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 d)
        if self.training or trace is not None:
            q, k, v = qkv.reshape(batch, tokens, 3, self.n_head, self.head_width).permute(2, 0, 3, 1, 4)  # each (B, H, T, d_k)
            q = self.scaled_queries(q, 0, tokens)
            if trace is not None:
                trace.queries.append(q)
                trace.keys.append(k)
            kept = trace.attention if trace is not None and trace.keep_attention else None
            y = self.mixed(q, k, v, future[:tokens, :tokens], kept).transpose(1, 2).reshape(batch, tokens, width)
        else:
            if self.scale is not None:
                qkv = torch.cat([qkv[..., :width] * self.scale, qkv[..., width:]], -1)
            y = self.operator(qkv)
        out: Tensor = self.c_proj(y[:, -1:] if last_only else y)
        return out
