"""How far a layer's rows of scores range: what calibration measures of them, and the ranges that a plan may choose from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from protocols.rowrange import HALVES, RowRange

MOST = 64  # halves of a nat that a plan's field holds
# nats, at either end, and what rounding up to halves adds; 4 more come above: a score up there counts as more than the top
HEADROOM = 0.5
ROW_PARTS = {
    "row_score": "a row's score above 0",
    "row_sum": "a row's log-sum-exp above 0",
    "row_sum_low": "a row's log-sum-exp below 0",
    "row_mean": "a row's log-mean-exp above 0",
    "row_mean_low": "a row's log-mean-exp below 0",
}
"""Measured parts and their names. Each is a distance from 0, in one direction, in nats."""


def measured_rows(scores: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`ROW_PARTS` of causal scores (B, H, T, T)."""
    size = scores.size(-1)
    scores = scores.masked_fill(torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1), float("-inf"))
    length = torch.arange(1, size + 1, device=scores.device).log()  # (T,)
    sums = scores.logsumexp(-1)
    yield "row_score", scores.amax(-1).relu()
    for part, total in (("row_sum", sums), ("row_mean", sums - length)):
        yield part, total.relu()
        yield f"{part}_low", (-total).relu()


def row_ranges(ranges: Mapping[str, float]) -> Iterator[RowRange]:
    """What may be chosen where the rows were measured: of log-sum-exps, and of log-mean-exps."""
    for part in ("row_sum", "row_mean"):
        seen = [ranges.get(f"{each}_seen") for each in ("row_score", part, f"{part}_low")]
        score, high, low = (math.inf if each is None else each + HEADROOM for each in seen)
        if max(score, high, low) >= MOST / HALVES:
            continue
        top, above, below = (math.ceil(HALVES * each) for each in (score, high, low))
        if max(top + below, above + below) <= MOST:
            yield RowRange(top, top + below, above + below, part == "row_mean")


def bound_of_rows(part: str, within: RowRange | None) -> float:
    """How far the planned range goes in the direction of a part; infinity where it does not matter."""
    if within is None or (part != "row_score" and within.by_length != part.startswith("row_mean")):
        return math.inf
    low = within.depth - within.top
    return (within.top if part.endswith("score") else low if part.endswith("low") else within.spread - low) / HALVES
