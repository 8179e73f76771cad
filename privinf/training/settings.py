"""What a training run depends on besides the model's configuration and the corpus."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocols.errors import ConfigError


class Limits(BaseModel):
    """Where the penalty starts. The bound on scores is |q_i| max_j |k_j|, so it holds for every pair, seen or not."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    score_bound: float = Field(default=32.0, gt=0)
    residual: float = Field(default=24.0, gt=0)
    logit: float = Field(default=32.0, gt=0)
    weight: float = Field(default=1e-2, ge=0)


class Settings(BaseModel):
    """All that a run depends on besides the model's configuration and the corpus."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(default=1, ge=0)
    batch: int = Field(default=16, ge=1)
    length: int = Field(default=256, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=200, ge=0)
    decay_fraction: float = Field(default=0.4, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    bf16: bool = False
    initial: Literal["ours", "gpt2"] = "ours"  # the recipe of the first weights
    temperature: float = Field(default=1.0, gt=0)  # first value of a learnable one; AERO: 1e-2, for its much smaller first scores
    ffn_norm: Literal["none", "weight", "spectral"] = "none"
    entropy_lambda: float = Field(default=0.0, ge=0)
    entropy_gamma: float = Field(default=0.2, ge=0, le=1)
    entropy_theta: float = Field(default=0.5, ge=0, le=1)  # first value of the learnable thresholds, in parts of log T
    limits: Limits = Limits()

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Settings, or a ConfigError that names every value at fault."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, not {fault['input']}" for fault in error.errors()]
            raise ConfigError("training settings: " + "; ".join(faults)) from None


def rate_at(settings: Settings, step: int, fraction: float) -> float:
    """Warmup by steps, then level, then linearly to zero over the last `decay_fraction` of the run."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    left = (1 - fraction) / settings.decay_fraction if settings.decay_fraction > 0 else 1.0
    return settings.learning_rate * warm * min(1.0, max(0.0, left))


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 itself. Where it does not, such a product takes 60 times as long as a float32 one."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
