"""Entropy of attention, and the regularisation that keeps it from collapsing or overloading.

Source: Jha and Reagen, "AERO" (arXiv 2410.13060) and "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERLOAD, COLLAPSE = 0.75, 0.05
"""Parts of log T: a head at or above the first hardly chooses, one at or below the second looks at one position alone."""


def head_entropy(attention: Tensor) -> Tensor:
    """attention (B, H, T, T), rows sum to 1 -> (B, H): -(1/T) sum_i sum_j A_ij log A_ij, in nats."""
    attention = attention.float()
    terms: Tensor = torch.special.xlogy(attention, attention.clamp_min(1e-30))  # (B, H, T, T), 0 log 0 = 0
    return -terms.sum(dim=-1).mean(dim=-1)


def entropy_penalty(attention: list[Tensor], theta: Tensor, gamma: float) -> Tensor:
    """Mean over layers, heads and batch of delta^2 where |delta| > gamma E_max, else 0; delta = E - theta E_max, E_max = log T.

    theta (L, H) is learnable; `attention` has one (B, H, T, T) per layer.
    """
    e_max = math.log(max(2, attention[0].shape[-1]))
    entropy = torch.stack([head_entropy(a) for a in attention], dim=1)  # (B, L, H)
    delta = entropy - theta * e_max
    return torch.where(delta.abs() > gamma * e_max, delta.square(), torch.zeros_like(delta)).mean()


def bands(entropy: Tensor, e_max: float) -> dict[str, float]:
    """entropy of heads, any shape, in nats -> the fractions of heads in overload and collapse, and in each quarter of the maximum."""
    parts = (entropy / e_max).flatten()
    quarter = (parts * 4).floor().clamp(0, 3)
    named = {"overload": parts >= OVERLOAD, "collapse": parts <= COLLAPSE} | {f"quarter_{n + 1}": quarter == n for n in range(4)}
    return {name: float(found.double().mean()) for name, found in named.items()}
