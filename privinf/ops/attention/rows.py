"""How far a layer's rows of scores range: what calibration measures of them, and the ranges that a plan may choose from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from privinf.graph.planning import Shown
from protocols.exponential import FRAC
from protocols.rowrange import DIGITS, HALVES, SCORES, RowRange, further
from protocols.softmax import DROP, SCORE_BITS

WIDEST_SCORE = 120.0  # what `protocols.softmax` is right for with a maximum
MOST = 64  # halves of a nat that a plan's field holds
# Nats above and below, and what rounding up to halves adds. A row above its range may lose up to all that it is above by, one below it
# has its reciprocal from coarser lines, 5e-4 off where it is half a nat below: room is spent above first.
HEADROOMS = ((2.0, 1.0), (2.0, 0.5), (1.5, 0.0), (1.5, -0.5), (1.0, 0.0), (0.5, 0.5))
"""The first that fits where the scores have offsets, which were made for it; elsewhere the last."""
ROW_PARTS = {
    "row_score": "a row's score above 0",
    "row_sum": "a row's log-sum-exp above 0",
    "row_sum_low": "a row's log-sum-exp below 0",
    "row_mean": "a row's log-mean-exp above 0",
    "row_mean_low": "a row's log-mean-exp below 0",
}
"""Measured parts and their names. Each is a distance from 0, in one direction, in nats."""


ROW_FIELDS = ("top", "depth", "spread", "by_length", "digit")  # of a `RowRange`, as a plan has them


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


def row_ranges(ranges: Mapping[str, float], headroom: tuple[float, float]) -> Iterator[RowRange]:
    """What may be chosen where the rows were measured: of log-sum-exps, and of log-mean-exps; each by the digits that hold all scores."""
    up, down = headroom
    for part in ("row_sum", "row_mean"):
        seen = ((f"{each}_seen", more) for each, more in (("row_score", up), (part, up), (f"{part}_low", down)))
        score, high, low = (max(ranges.get(each, math.inf) + more, 0.0) for each, more in seen)
        if max(score, high, low) >= MOST / HALVES:
            continue
        top, above, below = (math.ceil(HALVES * each) for each in (score, high, low))
        for digit in DIGITS:
            room = top + further(digit) + below
            if max(room, above + below) <= MOST and (digit == DIGITS[-1] or ranges.get("score", math.inf) <= SCORES * digit):
                yield RowRange(room - below, room, above + below, part == "row_mean", digit)


def bound_of_rows(part: str, within: RowRange | None) -> float:
    """How far the planned range goes, of a score or in the direction of a part; infinity where it does not matter."""
    if part == "score":
        return WIDEST_SCORE if within is None else float(within.widest_score)
    if within is None or (part != "row_score" and within.by_length != part.startswith("row_mean")):
        return math.inf
    low = within.depth - within.top
    return (within.top if part.endswith("score") else low if part.endswith("low") else within.spread - low) / HALVES


def chosen(
    ranges: Mapping[str, float],
    headrooms: Sequence[tuple[float, float]],
    fits: Callable[[RowRange], bool],
    width: Callable[[RowRange], int],
) -> RowRange | None:
    """The narrowest that fits, with the first headroom for which one does; none if none does."""
    for headroom in headrooms:
        found = [within for within in row_ranges(ranges, headroom) if fits(within)]
        if found:
            return min(found, key=width)
    return None


def shown_rows(within: RowRange | None, fine: int, known: bool) -> Iterator[Shown]:
    """The scores, and a layer's maximum or what stands in its place, for people; `known`: where the ranges are."""
    if within is None:
        bound = 2.0 ** (SCORE_BITS - 2 - FRAC)
        yield Shown("scores", SCORE_BITS + fine, FRAC + fine, bound, "protocol")
        yield Shown("maximum of a row, or the bound of one that is alone", SCORE_BITS - DROP, 1, bound, "protocol")
        return
    yield Shown("scores", within.score_bits, FRAC + fine, float(within.widest_score), "protocol")
    low, high = ((within.top - within.depth + part) / HALVES for part in (0, within.spread))
    told = f"log-{'mean' if within.by_length else 'sum'}-exp of rows in [{low:g}, {high:g}]"
    yield Shown(f"no maximum, {told}", within.window.bits, within.window.out_frac, within.scale * within.topmost if known else None)
