"""The fraction bits of q and of k, of temperatures and of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from privinf.graph.planning import DIAGONAL_FRAC
from protocols.exponential import FINER

QK_FRAC = 26  # of q and k together
LARGE_ROW = 32.0  # of a row's log-sum-exp or largest score, at calibration
MOST_MORE = 2
# How much larger a logit's error is than the standard deviation of those of scores, or of a weight's: beyond it these have more fraction
# bits (`privinf.lowering.gains`).
ENLARGED_SCORES = 24.0
ENLARGED_WEIGHTS = 900.0
MORE_WEIGHT = 2


def usual_fracs(head_dim: int) -> tuple[int, int]:
    """Of q and of k. q comes divided by the root of d_k and k does not: a rounding of q is multiplied by that much more than one of k."""
    q_frac = (QK_FRAC + round(math.log2(head_dim) / 2) + 1) // 2
    return q_frac, QK_FRAC - q_frac


def finer(ranges: Mapping[str, float]) -> int:
    """Of scores, and of v and its sums, beyond those of other layers: where what scores are off by is enlarged on its way to the logits.

    It hangs on nothing but how far that is, in the first layers of networks whose later rows are torn between two large scores.
    """
    return FINER if ranges.get("score_gain", 0.0) > ENLARGED_SCORES else 0


def finer_weights(ranges: Mapping[str, float]) -> int:
    """Of the map to q, k and v with these ranges."""
    return MORE_WEIGHT if ranges.get("weight_gain", 0.0) > ENLARGED_WEIGHTS else 0


def score_fracs(head_dim: int, ranges: Mapping[str, Mapping[str, float]], finer: int = 0) -> tuple[int, int]:
    """Of q and of k in a network with these ranges, in a layer whose scores have `finer` fraction bits.

    Where rows of any layer have large scores, two of them may be large and close together, and their layer then enlarges a hundredfold what
    its input is off by: q and k of all layers have a bit more each from `LARGE_ROW` on, and another for every doubling, up to `MOST_MORE`.
    """
    q_frac, k_frac = usual_fracs(head_dim)
    largest = max(entry.get(f"{part}_seen", 0.0) for entry in ranges.values() for part in ("row_score", "row_sum_low"))
    more = min(MOST_MORE, math.floor(math.log2(largest / LARGE_ROW)) + 1) if largest > LARGE_ROW else 0
    more = max(more, finer)
    return q_frac + more, k_frac + more


def temperature_frac(head_dim: int, k_frac: int, finer: int = 0) -> int:
    """Of the temperatures: what k has more they have less, as the ring of q is full. What they are off by all scores of a row share.

    Where scores are finer q is widened after them.
    """
    return DIAGONAL_FRAC if finer else DIAGONAL_FRAC - (k_frac - usual_fracs(head_dim)[1])
