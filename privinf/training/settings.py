"""What a training run depends on besides the model's configuration and the corpus."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privinf.setting import Setting
from protocols.errors import ConfigError


class Limits(BaseModel):
    """Where the penalty starts. The bound on scores is |q_i| max_j |k_j|, so it holds for every pair, seen or not."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    score_bound: float = Field(default=32.0, gt=0)
    residual: float = Field(default=24.0, gt=0)
    logit: float = Field(default=32.0, gt=0)
    weight: float = Field(default=1e-2, ge=0)


class Settings(BaseModel):
    """All that a run depends on besides the model's configuration and the corpus.

    Its attributes are the options of `privinf train`, and stand flat in a run's directory.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Setting("Names the random numbers.", "N", least=0)] = 1
    batch: Annotated[int, Setting("Pieces of text in one step.", "N", least=1)] = 16
    length: int = Field(default=256, ge=1)
    optimizer: Annotated[Literal["adamw", "muon"], Setting("Of the layers' matrices; muon wants a processor that multiplies bfloat16.")] = (
        "adamw"
    )
    learning_rate: Annotated[float, Setting("The level between warmup and decay.", "X")] = Field(default=3e-3, gt=0)
    warmup_steps: Annotated[int, Setting("Steps of rising rate.", "N", least=0, name="warmup")] = 200
    decay_fraction: Annotated[float, Setting("Part of the run in which the rate falls to zero.", "X", least=0, most=1, name="decay")] = 0.4
    weight_decay: float = Field(default=0.1, ge=0)
    clip: Annotated[float, Setting("The largest norm of a step's gradients.", "X")] = Field(default=1.0, gt=0)
    bf16: bool = False
    initial: Annotated[Literal["ours", "gpt2"], Setting("Recipe of the first weights.")] = "ours"
    temperature: Annotated[float, Setting("First value of the learnable temperatures (AERO: 1e-2).", "X")] = Field(
        default=1.0, gt=0
    )  # theirs is for much smaller first scores
    ffn_norm: Annotated[Literal["none", "weight", "spectral"], Setting("Normalise the FFN matrices while training; folded at export.")] = (
        "none"
    )
    entropy_lambda: Annotated[float, Setting("Weight of the entropy regularisation (AERO: 1e-5); 0 leaves it out.", "X")] = Field(
        default=0.0, ge=0
    )
    entropy_gamma: Annotated[float, Setting("Its tolerance, as a part of the largest entropy.", "X")] = Field(default=0.2, ge=0, le=1)
    entropy_theta: Annotated[float, Setting("First value of its learnable thresholds, as a part of the largest entropy.", "X")] = Field(
        default=0.5, ge=0, le=1
    )
    row_weight: Annotated[
        float, Setting("Weight of the penalty on rows of scores whose log-mean-exp is out of range; 0 leaves it out, 0.05 is a start.", "X")
    ] = Field(default=0.0, ge=0)
    row_low: Annotated[float, Setting("Where that range begins, in nats.", "X")] = -2.5
    row_high: Annotated[float, Setting("Where it ends.", "X")] = 2.0
    row_top: Annotated[float, Setting("What a score in it may be at most.", "X")] = 4.5
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
    import torch

    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
