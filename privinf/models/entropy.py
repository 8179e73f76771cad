"""Entropy of attention, and the regularisation that keeps it from collapsing or overloading.

Source: Jha and Reagen, "AERO" (arXiv 2410.13060) and "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
