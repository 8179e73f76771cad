"""How learnable scalars go into weights, so that a private pass has none.

With x = p x~, where p is the product of the betas so far, the stream carries x~ and every residual is a plain sum. Maps that read the
stream take the factor p (a norm is blind to it, but for epsilon / p^2 and the sign), maps that write to it 1 / p, the FFN also
1 / (alpha beta).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from protocols.errors import ConfigError


class Scaled(Protocol):
    """An FFN: alpha divides what it adds, beta multiplies the residual beside it."""

    alpha: nn.Parameter | None
    beta: nn.Parameter | None


def read(norm: nn.LayerNorm | nn.RMSNorm | None, weights: Sequence[Tensor], p: float) -> None:
    """Lets maps that read x = p x~ read x~ instead: through their norm if they have one, else in their matrices."""
    if norm is not None:
        norm.eps = (norm.eps or 0.0) / (p * p)
        norm.weight.mul_(math.copysign(1, p))
        return
    for weight in weights:
        weight.mul_(p)


def write(weight: Tensor, bias: Tensor | None, p: float) -> None:
    """Lets a map that writes x write x / p instead."""
    for each in (weight, bias):
        if each is not None:
            each.div_(p)


def take_scalars(mlp: Scaled, p: float, layer: str) -> tuple[float, float]:
    """(alpha, p beta), which its weights and those after it take up; ConfigError where they cannot."""
    if mlp.alpha is None or mlp.beta is None:
        return 1.0, p
    alpha, beta = float(mlp.alpha), float(mlp.beta)
    if abs(p * beta) < 1e-12:
        raise ConfigError("beta is zero, or so small that the weights cannot take it up", layer=f"{layer}.beta")
    mlp.alpha = mlp.beta = None
    return alpha, p * beta
