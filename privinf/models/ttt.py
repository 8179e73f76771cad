"""TTT-Linear: in place of attention an inner linear model that learns from the text while it reads, and what is left of the rest.

Source: Sun et al., "Learning to (Learn at Test Time)" (arXiv 2407.04620), on a transformer's backbone, without the inner LayerNorm.

B batch, T tokens, H heads of width P, d = H P model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from privinf.models.base import Activations
from privinf.models.recurrent import Recurrent, RecurrentConfig, RecurrentModel
from protocols.recurrence import inner_descent

SIZED = 64  # a trace's keys are larger by its root and a mini-batch's: what training holds scores to, 32, is half a step that settles


class TttConfig(RecurrentConfig):
    """One model of TTT-Linear's kind."""

    model_type: Literal["ttt"]
    mini_batch: int = Field(default=16, ge=1, le=1024)
    ffn: Literal["swiglu", "relu", "none"] = "swiglu"

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
        self.norm = config.rms_norm()
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        descend, k = inner_descent if self.training else torch.ops.privinf.ttt, self.k_proj(x)
        if trace is not None:
            sized = k * math.sqrt(SIZED * self.batch)
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
        self.norm = config.rms_norm()
        self.learner = Learner(config)
        self.mlp = None if config.ffn == "none" else FeedForward(config)
        self.mlp_norm = None if self.mlp is None else config.rms_norm()

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        x = x + self.learner(x if self.norm is None else self.norm(x), trace)
        if self.mlp is None:
            return x
        found: Tensor = x + self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        return found


class TttModel(RecurrentModel):
    """Of such blocks."""

    config: TttConfig
    block = Block


class Ttt(Recurrent):
    """See `Recurrent`."""

    model_type = "ttt"
    config = TttConfig
    decoder = TttModel
    state = ("start", "now")
