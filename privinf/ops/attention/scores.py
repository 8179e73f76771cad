"""The fraction bits of q and of k, and of temperatures."""

from __future__ import annotations

import math
from collections.abc import Mapping

from privinf.graph.planning import DIAGONAL_FRAC

QK_FRAC = 26  # of q and k together
LARGE_ROW = 32.0  # of a row's log-sum-exp or largest score, at calibration
MOST_MORE = 2


def usual_fracs(head_dim: int) -> tuple[int, int]:
    """Of q and of k. q comes divided by the root of d_k and k does not: a rounding of q is multiplied by that much more than one of k."""
    q_frac = (QK_FRAC + round(math.log2(head_dim) / 2) + 1) // 2
    return q_frac, QK_FRAC - q_frac


def score_fracs(head_dim: int, ranges: Mapping[str, Mapping[str, float]]) -> tuple[int, int]:
    """Of q and of k in a network with these ranges.

    Where rows of any layer have large scores, two of them may be large and close together, and their layer then enlarges a hundredfold what
    its input is off by: q and k of all layers have a bit more each from `LARGE_ROW` on, and another for every doubling, up to `MOST_MORE`.
    """
    q_frac, k_frac = usual_fracs(head_dim)
    largest = max(entry.get(f"{part}_seen", 0.0) for entry in ranges.values() for part in ("row_score", "row_sum_low"))
    more = min(MOST_MORE, math.floor(math.log2(largest / LARGE_ROW)) + 1) if largest > LARGE_ROW else 0
    return q_frac + more, k_frac + more


def temperature_frac(head_dim: int, k_frac: int) -> int:
    """Of the temperatures: what k has more they have less, as the ring of q is full. What they are off by all scores of a row share."""
    return DIAGONAL_FRAC - (k_frac - usual_fracs(head_dim)[1])
