"""TTT-Linear: in place of attention an inner linear model that learns from the text while it reads, and what is left of the rest.

Source: Sun et al., "Learning to (Learn at Test Time)" (arXiv 2407.04620), on a transformer's backbone, without the inner LayerNorm.

B batch, T tokens, H heads of width P, d = H P model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from privinf.models.base import Activations, Config, Decoder, Family
from protocols.recurrence import inner_descent


class TttConfig(Config):
    """One model of TTT-Linear's kind."""

    model_type: Literal["ttt"]
    n_inner: int = Field(ge=1, le=10_000_000)
    mini_batch: int = Field(default=16, ge=1, le=1024)
    norm: Literal["rmsnorm", "none"] = "rmsnorm"
    ffn: Literal["swiglu", "relu", "none"] = "swiglu"
    norm_epsilon: float = Field(default=1e-5, gt=0, lt=1)
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _fields_agree(self) -> TttConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: {self.n_embd} is not a multiple of n_head, {self.n_head}")
        return self

    @property
    def variant(self) -> str:
        """The name on the road: of `TTT` products alone are left."""
        ffn = {"swiglu": ["SwiGLU"], "relu": ["R"], "none": []}[self.ffn]
        return "+".join(["TTT", *(["RN"] if self.norm == "rmsnorm" else []), *ffn])


class Learner(nn.Module):
    """q, k and v of each head; z = q W, as W learns v from k; and the way back to the stream."""

    def __init__(self, config: TttConfig) -> None:
        super().__init__()
        width, self.batch = config.n_embd // config.n_head, config.mini_batch
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(3))
        self.weight = nn.Parameter(torch.zeros(config.n_head, width, width))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_epsilon) if config.norm == "rmsnorm" else None
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        descend, k = inner_descent if self.training else torch.ops.privinf.ttt, self.k_proj(x)
        if trace is not None:
            sized = k * math.sqrt(64 * self.batch)  # so that what training holds scores to, 32, is half a step that settles
            trace.keys.append(sized.reshape(*x.shape[:2], len(self.weight), -1).transpose(1, 2))
            trace.queries.append(trace.keys[-1])
        z = descend(self.q_proj(x), k, self.v_proj(x), self.weight, self.batch)
        out: Tensor = self.o_proj(z if self.norm is None else self.norm(z))
        return out


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(relu(up(x)))."""

    def __init__(self, config: TttConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False) if config.ffn == "swiglu" else None
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        up = self.up_proj(x)
        found: Tensor = self.down_proj(F.relu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)
        return found


class Block(nn.Module):
    """x + learner(norm(x)), and then the same with an FFN, if there is one."""

    def __init__(self, config: TttConfig) -> None:
        super().__init__()
        normed = config.norm == "rmsnorm"
        self.norm = nn.RMSNorm(config.n_embd, config.norm_epsilon) if normed else None
        self.learner = Learner(config)
        self.mlp = None if config.ffn == "none" else FeedForward(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, config.norm_epsilon) if normed and self.mlp is not None else None

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        x = x + self.learner(x if self.norm is None else self.norm(x), trace)
        if self.mlp is None:
            return x
        found: Tensor = x + self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        return found


class TttModel(Decoder):
    """Ids (B, T) to logits (B, T, V)."""

    config: TttConfig

    def __init__(self, config: TttConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.n_embd, config.norm_epsilon) if config.norm == "rmsnorm" else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def forward(self, ids: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """ids (B, T), 1 <= T <= n_positions -> logits (B, T, V), or (B, V) of the last position. The trace gets the stream, and keys."""
        x = self.embeddings(ids)  # (B, T, d)
        stream = [x]
        for block in self.layers:
            x = block(x, trace)
            stream.append(x)
        if trace is not None:
            trace.residual.extend(stream)
        if last_only:
            x = x[:, -1]  # (B, d)
        logits: Tensor = self.lm_head(x if self.norm_f is None else self.norm_f(x))
        return logits


class Ttt(Family):
    """Ours: its configuration is small, and no checkpoint of elsewhere is read."""

    model_type = "ttt"
    state = ("start", "now")

    def configure(self, fields: Mapping[str, Any], source: str) -> TttConfig:
        return TttConfig.checked(fields, source)

    def build(self, config: TttConfig) -> TttModel:
        return TttModel(config)

    def tables(self, config: TttConfig) -> Mapping[str, str]:
        return {"lm_head.weight": "embeddings.weight"} if config.tie_word_embeddings else {}
