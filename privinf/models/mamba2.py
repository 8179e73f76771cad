"""Mamba-2, and what is left of it without its gate, its softplus, its convolution, its norm, and decays that hang on the text.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060); public decays as in Sun et al., "Retentive Network" (arXiv 2307.08621).

B batch, T tokens, H heads, P = n_inner / H their width, N = n_state, d model width, V vocabulary. All heads have the same B
and C.
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
from protocols.recurrence import recurrence, short_convolution


class Mamba2Config(RecurrentConfig):
    """One model of Mamba-2's kind. More than a dozen attributes: what its file has."""

    model_type: Literal["mamba2"]
    n_inner: int = Field(ge=1, le=1_000_000)
    n_state: int = Field(default=16, ge=1, le=65_536)
    decay: Literal["softplus", "relu", "fixed"] = "softplus"
    conv: int = Field(default=4, ge=0, le=64)
    gate: Literal["silu", "relu", "linear", "none"] = "silu"

    @model_validator(mode="after")
    def _fields_agree(self) -> Mamba2Config:
        if self.n_inner % self.n_head:
            raise ValueError(f"n_inner: {self.n_inner} is not a multiple of n_head, {self.n_head}")
        if self.conv == 1:
            raise ValueError("conv: one tap is none; it is 0, or 2 and more")
        return self

    @property
    def variant(self) -> str:
        """The name on the road: `M2(sp)+Conv+RN+SiLU` is Mamba-2, and of `M2(fix)` products alone are left."""
        decay = {"softplus": "sp", "relu": "relu", "fixed": "fix"}[self.decay]
        gate = {"silu": ["SiLU"], "relu": ["R"], "linear": ["GLU"], "none": []}[self.gate]
        return "+".join([f"M2({decay})", *(["Conv"] if self.conv else []), *(["RN"] if self.norm == "rmsnorm" else []), *gate])

    @property
    def shifts(self) -> tuple[int, ...]:
        """Of public decays 1 - 2^-shift, from a half to what remembers the context, evenly over the heads; none where they are learned."""
        if self.decay != "fixed":
            return ()
        last, steps = max(1, min(16, round(math.log2(self.n_positions)))), max(1, self.n_head - 1)
        return tuple(1 + round(head * (last - 1) / steps) for head in range(self.n_head))


class Mixer(nn.Module):
    """x, B, C from the input, perhaps convolved; decays; the recurrence; perhaps a gate; and the way back to the stream."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        inner, state, self.config = config.n_inner, config.n_state, config
        self.in_proj = nn.Linear(config.n_embd, inner + 2 * state, bias=False)
        self.z_proj = None if config.gate == "none" else nn.Linear(config.n_embd, inner, bias=False)
        self.dt_proj = None if config.decay == "fixed" else nn.Linear(config.n_embd, config.n_head)
        self.A_log = nn.Parameter(torch.zeros(config.n_head)) if config.decay == "softplus" else None
        self.conv_weight = nn.Parameter(torch.zeros(config.conv, 1, inner + 2 * state)) if config.conv else None
        self.conv_bias = nn.Parameter(torch.zeros(inner + 2 * state)) if config.conv else None
        self.D = nn.Parameter(torch.ones(config.n_head)) if config.conv else None
        self.norm = config.rms_norm(inner)
        self.out_proj = nn.Linear(inner, config.n_embd, bias=False)

    def activated(self, x: Tensor) -> Tensor:
        """By the gate's function."""
        return F.silu(x) if self.config.gate == "silu" else F.relu(x) if self.config.gate == "relu" else x

    def forward(self, u: Tensor) -> Tensor:
        """u (B, T, d) -> (B, T, d)."""
        inner, state, each = self.config.n_inner, self.config.n_state, self.config.n_inner // self.config.n_head
        parts = self.in_proj(u)  # (B, T, inner + 2 N)
        if self.conv_weight is not None:
            short = short_convolution if self.training else torch.ops.privinf.taps
            parts = self.activated(short(parts, self.conv_weight) + self.conv_bias)
        x, b, c = parts[..., :inner], parts[..., inner : inner + state], parts[..., inner + state :]
        into, z = x, None
        if self.dt_proj is not None:
            z = self.dt_proj(u)  # (B, T, H)
            z = F.relu(z) if self.A_log is None else F.softplus(z)
            if self.A_log is not None:
                into, z = x * self.spread(z, each), z * self.A_log.exp()
        scan = recurrence if self.training else torch.ops.privinf.scan
        y = scan(into, b, c, z, self.config.shifts, self.A_log is None)
        if self.D is not None:
            y = y + x * self.D.repeat_interleave(each)
        if self.z_proj is not None:
            y = y * self.activated(self.z_proj(u))
        out: Tensor = self.out_proj(y if self.norm is None else self.norm(y))
        return out

    def spread(self, z: Tensor, each: int) -> Tensor:
        """z (B, T, H) for each column of its head, (B, T, inner)."""
        if self.training:
            return z.repeat_interleave(each, -1)
        found: Tensor = torch.ops.privinf.spread(z, each)
        return found


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = config.rms_norm()
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d); there is nothing to trace."""
        found: Tensor = x + self.mixer(x if self.norm is None else self.norm(x))
        return found


class Mamba2Model(RecurrentModel):
    """Of such blocks."""

    config: Mamba2Config
    block = Block


class Mamba2(Recurrent):
    """See `Recurrent`."""

    model_type = "mamba2"
    config = Mamba2Config
    decoder = Mamba2Model
    state = ("state",)
