"""Softmax over ragged rows, and causal attention on masked wires.

The composition of `docs/protocols.md`: the scores are opened once, masked, in 21 bits, and the maximum and the
exponential read that one wire. Softmax is invariant under shifts, so that the maximum is only needed to within 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protocols.ceiling import cost_row_ceiling, row_ceiling
from protocols.declared import Declared
from protocols.exponential import BELOW_MAXIMUM, FRAC, TABLE_FRAC, Window, cost_exponential, exponential
from protocols.maximum import cost_row_maximum, cost_upper_wire, row_maximum, upper_wire
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, cost_multiply, cost_scores, cost_weighted, multiply, scores, weighted
from protocols.reciprocal import LEAST_EXTRA, cost_reciprocal, reciprocal
from protocols.ring import known
from protocols.rowrange import RECIPROCAL_FRAC, RowRange
from protocols.rows import Rows, radices
from protocols.sequences import Stack, scores_of_sequences, weighted_of_sequences
from protocols.shares import Shares, Wire
from protocols.truncation import cost_rescale, rescale

SCORE_BITS = 21  # 12 of them fraction: scores within [-128, 128) do not wrap where they are compared
DROP = 11  # the maximum is taken over the upper 10 bits, units of 1/2
WEIGHT_FRAC = 16  # of the exponentials
LARGEST = 1.66  # e^0.5 and the roundings: no exponential is larger
WIDEST = 64 - LEAST_EXTRA  # ring of a reciprocal
UNIT = FRAC  # a row's bound is found in units of 1
ABOVE = 1.9  # that is added to it, so that results, scaled by 4, are at most LARGEST
BELOW_CEILING = Window(1, TABLE_FRAC + 2)
SPARED = 2  # bits by which the ring is wider: no result wraps where a threshold was missed
FINER = 1  # fraction bits by which their sums are scaled, so that none is far below 0.5
MISSED = 2.72  # times LARGEST: what a result is at most where a threshold was missed
FLOOR = 2  # what a sum without a maximum has besides, in units of 2^-16: 2^-14 of the lowest sum within the range


def exponentials(party: Party, score: Shares, rows: Rows, bits: int, *, at_once: bool = False, fine: int = 0) -> Protocol_[Shares]:
    """e^(x - m) for packed rows of scores (H, N) and an m within 1/2 of each row's maximum; in Z_2^bits, 16 fraction bits.

    Steps: the scores are opened masked in 21 bits; the maximum over the wire's upper 10 bits (`row_maximum`); the
    exponential of the difference of the two wires; truncate-reduce to 18 bits, extend to `bits`; or `at_once` the exponential in a
    ring so wide that no extension is needed. A single row of more than one level (`bounded_by_thresholds`) has no maximum but a bound
    that is 0.9 to 2.9 above (`row_ceiling`), and results that are scaled by 4; where a threshold was missed they are too large by e.
    Scores that have `fine` fraction bits more are opened in as many more bits.
    Domain: scores in [-120, 120], rows of 1 to 1024. Error: 2.1e-4 absolute, where the row's largest is at least 0.6, or 0.22.
    Rounds: 1 + those of `row_maximum`, or 3, + 1 + 1, the last not `at_once`.
    Bytes per element, both directions: 5.25 + about 3 + 9 + 0.25.
    Learns: uniform values, both; the rows' lengths are public.
    """
    (x,) = yield from open_masked(party, [score])
    window, ring = _window(rows, bits, at_once)
    window, unit, drop = replace(window, fine=fine), UNIT + fine, DROP + fine
    if bounded_by_thresholds(rows):
        top = yield from row_ceiling(party, x, rows, unit)
        above = torch.tensor([round(ABOVE * (1 << unit))])
        e = yield from exponential(party, x, top, rows, unit, window=window, offset=above, bits=ring)
    else:
        top = yield from row_maximum(party, upper_wire(party, x, drop), rows)
        e = yield from exponential(party, x, top, rows, drop, window=window, bits=ring)
    return (yield from _weights_of(party, e, bits))


def bounded_exponentials(
    party: Party, score: Shares, rows: Rows, bits: int, within: RowRange, *, at_once: bool = False, live: Live | None = None
) -> Protocol_[Shares]:
    """e^(x - top) for packed rows of scores (H, N) that stay `within` a public range, without a maximum; in Z_2^bits.

    Steps: the scores are opened masked in 18 to 20 bits; the exponential of the wire less the public top; truncate-reduce, extend to `bits`
    (`at_once`: see `exponentials`). 16 fraction bits, of values that are scaled by `RowRange.scale`, and divided by the length of
    the row where the range is `by_length`: a softmax is the same.
    Domain: scores up to `RowRange.widest_score`, 30 to 120, rows of 1 to 1024, a top of at most 12. A score above the top counts as
    between the top and `RowRange.topmost` times it, e to e^4, and one far below as nothing, so that a row out of its range is softened
    and no sum is above `RowRange.largest`.
    Error: 1.1e-4 relative, and 1e-4 of the lowest sum at most. Rounds: 3, or 2.
    Bytes per element, both directions: 4.5 to 5, and 2 in the window's bits. Learns: uniform values, both; the rows' lengths are public.
    """
    (x,) = yield from open_masked(party, [score.narrow(within.score_bits)])
    window, ring = _exp_ring(within.window, bits, at_once)
    offset, divisor = within.divided(rows) if live is None or live.offset is None else (live.offset, live.divisor)
    e = yield from exponential(party, x, None, rows, 0, window=window, offset=offset, divisor=divisor, bits=ring)
    return (yield from _weights_of(party, e, bits))


def bounded_by_thresholds(rows: Rows) -> bool:
    """Whether rows have a bound and no maximum: where each is alone of its sequence, and a tournament would have several levels."""
    return rows.alone and len(radices(rows)) > 1


def _window(rows: Rows, bits: int, at_once: bool) -> tuple[Window, int]:
    """That of rows whose maximum or bound is taken, and the ring of their exponentials."""
    return _exp_ring(BELOW_CEILING, bits, at_once, SPARED) if bounded_by_thresholds(rows) else _exp_ring(BELOW_MAXIMUM, bits, at_once)


def _exp_ring(window: Window, bits: int, at_once: bool, spared: int = 0) -> tuple[Window, int]:
    """The ring of the exponential: as narrow as it may be, or so wide that what is left after truncation is in Z_2^bits.

    Where 64 bits do not hold that, a window that has more fraction bits than weights need gives all but one of its spare ones.
    """
    wide, given = window.out_frac - WEIGHT_FRAC + bits, min(window.spare - 1, window.frac - TABLE_FRAC)
    if not at_once or wide - given > 64:
        return window, window.bits + spared
    less = max(0, wide - 64)
    return replace(window, spare=window.spare - less), max(window.bits + spared, wide) - less


def _weights_of(party: Party, e: Shares, bits: int) -> Protocol_[Shares]:
    e = yield from rescale(party, e, bits=e.bits - (e.frac - WEIGHT_FRAC), frac=WEIGHT_FRAC)
    return (yield from rescale(party, e, bits=bits, frac=WEIGHT_FRAC, nonnegative=True))


def _inverse(party: Party, e: Shares, rows: Rows, bits: int, within: RowRange | None = None) -> Protocol_[Wire]:
    """The reciprocals of the rows' sums, opened; where no maximum is known the sum has a small public term, so that it is never 0."""
    sums = e.map(rows.sum)
    if within is not None and party.is_server and known(sums.value):
        sums = sums.with_value(sums.value + FLOOR)
    bound, exact, finer = _bounds(rows, within)
    frac = RECIPROCAL_FRAC if within is None else within.reciprocal_frac
    sums = Shares(sums.value, sums.bits, sums.frac - finer, sums.early)  # 2^finer of what they are
    y = yield from reciprocal(party, sums, bound=bound, bits=bits, frac=frac + finer, exact=exact)
    (wire,) = yield from open_masked(party, [Shares(y.value, y.bits, frac)])
    return wire


def _bounds(rows: Rows, within: RowRange | None) -> tuple[float, float | None, int]:
    """The largest sum of a row, the largest whose reciprocal must be exact, and the logarithm of what both are scaled by."""
    if within is not None:
        return within.largest(rows.columns), within.exact, 0
    finer = FINER if bounded_by_thresholds(rows) else 0
    return LARGEST * (MISSED if finer else 1) * rows.columns * 2**finer, None, finer


def _opened(party: Party, x: Shares, bits: int, frac: int) -> Protocol_[Wire]:
    x = yield from rescale(party, x, bits=bits, frac=frac)
    (wire,) = yield from open_masked(party, [x])
    return wire


def softmax(party: Party, x: Shares, rows: Rows, *, bits: int, frac: int) -> Protocol_[Shares]:
    """The softmax of packed rows (H, N), in Z_2^bits with `frac` fraction bits; x in any ring that holds it.

    Steps: `exponentials`; the reciprocal of each row's sum; their product. Domain: that of `exponentials`.
    Error: 1.6e-4 of the value, either way, and by the roundings of a row's n exponentials, which are right on average, a standard
    deviation of at most 1.3e-5 sqrt(n). Largest seen: 1.3e-4 in 10^6 rows of n <= 8, 4e-4 in 10^5 rows of n = 128 and 1e-3
    in 10^4 rows of n = 1024, where one score dominates and the rest hold a few per cent together.
    Rounds: those of `exponentials`, 1 + those of `reciprocal`, 1. Learns: uniform values, both.
    """
    score = yield from rescale(party, x, bits=SCORE_BITS, frac=FRAC)
    ring = WEIGHT_FRAC + RECIPROCAL_FRAC + 3
    e = yield from exponentials(party, score, rows, ring)
    (e_wire,), y = yield from parallel(open_masked(party, [e]), _inverse(party, e, rows, ring))
    p = multiply(party, e_wire, y, ring, rows)
    return (yield from rescale(party, p, bits=bits, frac=frac))


@dataclass(frozen=True, slots=True)
class AttentionRings:
    """The rings of one attention region; the ring plan sets them."""

    qk_bits: int = 33  # q and k, and their product
    q_frac: int = 12
    k_frac: int = 12
    v_bits: int = 44  # the weights and v, and their product
    v_frac: int = 12
    sum_frac: int = 12  # of the unnormalised sums of v
    product_bits: int = 40  # their product with the reciprocals
    out_bits: int = 40  # the result
    out_frac: int = 13
    within: RowRange | None = None  # where the rows stay within a range, so that no maximum is taken
    score_fine: int = 0  # fraction bits that the scores have beyond those of others

    @property
    def score_bits(self) -> int:
        """That of the scores."""
        return SCORE_BITS + self.score_fine if self.within is None else self.within.score_bits

    @property
    def score_frac(self) -> int:
        """Fraction bits of the scores."""
        return FRAC + self.score_fine

    @property
    def reciprocal_frac(self) -> int:
        """Fraction bits of the reciprocals."""
        return RECIPROCAL_FRAC if self.within is None else self.within.reciprocal_frac

    def product_ring(self, rows: Rows) -> int:
        """That of the normalisation: so wide, if it can be, that the result is a truncate-reduction, where a round is worth it.

        That is for a single row of each sequence, and for rows whose maximum is taken: they are the ones that take many rounds.
        """
        wide = self.out_bits + self.sum_frac + self.reciprocal_frac - self.out_frac
        return max(self.product_bits, wide) if (rows.alone or self.within is None) and wide <= WIDEST else self.product_bits

    def weights_ring(self, rows: Rows) -> int:
        """That of the weights and of their product with v: of single rows no wider than rows of their length need."""
        if not rows.alone:
            return self.v_bits
        largest = LARGEST * rows.columns if self.within is None else self.within.largest(rows.columns)
        values = self.product_bits - self.sum_frac - self.reciprocal_frac  # the range of v, sign and headroom
        return min(self.v_bits, WEIGHT_FRAC + self.v_frac + math.ceil(math.log2(largest)) + values)


@dataclass(frozen=True, eq=False, slots=True)
class Live:
    """Of a row that is filled up, or one of each sequence: what of it counts, (N,) of 0 and 1, and `RowRange.divided_row` of its length."""

    mask: Tensor
    offset: Tensor | None = None
    divisor: tuple[Tensor, Tensor] | None = None


Values = Cached | Stack


def attention(
    party: Party,
    q: Wire,
    keys: Values,
    values: Values | Protocol_[Values],
    rows: Rows,
    rings: AttentionRings,
    *,
    at_once: bool = False,
    live: Live | None = None,
    offset: Shares | None = None,
) -> Protocol_[Shares]:
    """softmax(q k^T) v on masked wires: q (H, n, d), keys and values (H, m, d) -> (H, n, d), in Z_2^out_bits.

    Or q (H, G, n, d), keys and values (H, 1, m, d) -> (H G, n, d), where G heads of queries share keys and values (arXiv 2305.13245).
    Or keys and values of several sequences, (H, S, d), for the rows of each.
    `rows` says which elements of (n, m) exist. Of a row that is filled up (`Cached.padded`) those that are not `live` are scores of
    the first key again, which change no maximum; their exponentials are multiplied by a public 0. The sums are normalised after the
    product with v, so that the values may be a protocol that is still to make them, beside the scores and the exponentials.
    An `offset` (H, n) in the scores' ring is added to all scores of its query, by each party to its shares: the result is the same.
    Domain: scores in [-120, 120] or what `within` has, results in [-64, 64) at the default rings. Error, for |v| <= V and rows of n:
    V times that of `softmax`; V n 2^-19 where a row is flat (the reciprocal has 20 fraction bits); 2^-11 by the roundings.
    Rounds: those of `exponentials`, then 1 + those of `reciprocal` (the products run beside it), then 1.
    Learns: uniform values, both.
    """
    lead = q.shape[:-2]
    weights = _weights(party, q, keys, rows, rings, at_once, live, offset)
    e, v = (yield from parallel(weights, values)) if isinstance(values, Generator) else ((yield from weights), values)
    product_bits, ring = rings.product_ring(rows), rings.weights_ring(rows)

    heads, number, width = e.shape[0], rows.number, v.masked.shape[-1]

    def sums() -> Protocol_[Wire]:
        (p,) = yield from open_masked(party, [e.map(lambda x: x.reshape(*lead, -1))])
        z = (weighted_of_sequences if isinstance(v, Stack) else weighted)(party, p, v, rows, ring)  # type: ignore[arg-type]
        z = z.map(lambda x: x.reshape(heads, number * width))
        return (yield from _opened(party, z, product_bits, rings.sum_frac))

    z, y = yield from parallel(sums(), _inverse(party, e, rows, product_bits, rings.within))
    out = multiply(party, z, y, product_bits, Rows(width, number, 0))
    out = yield from rescale(party, out, bits=rings.out_bits, frac=rings.out_frac)
    return out.map(lambda x: x.reshape(heads, number, width))


def _weights(
    party: Party,
    q: Wire,
    keys: Values,
    rows: Rows,
    rings: AttentionRings,
    at_once: bool,
    live: Live | None,
    offset: Shares | None,
) -> Protocol_[Shares]:
    """The exponentials of the scores, one head after the other."""
    score = (scores_of_sequences if isinstance(keys, Stack) else scores)(party, q, keys, rows, rings.qk_bits)  # type: ignore[arg-type]
    score = score.map(lambda x: x.flatten(0, -2))
    score = yield from rescale(party, score, bits=rings.score_bits, frac=rings.score_frac)
    if offset is not None:
        score = score + offset.map(rows.spread)
    if rings.within is None:
        e = yield from exponentials(party, score, rows, rings.weights_ring(rows), at_once=at_once, fine=rings.score_fine)
    else:
        e = yield from bounded_exponentials(party, score, rows, rings.weights_ring(rows), rings.within, at_once=at_once, live=live)
    return e if live is None else e.times(live.mask)


def cost_exponentials(heads: int, rows: Rows, bits: int, *, early: bool = False, at_once: bool = False, fine: int = 0) -> Declared:
    """Opening, maximum or bound, exponential, extension."""
    count, upper = heads * rows.count, SCORE_BITS - DROP
    window, ring = _window(rows, bits, at_once)
    if bounded_by_thresholds(rows):
        found = cost_row_ceiling(heads, rows)
    else:
        found = cost_upper_wire(count, upper) + cost_row_maximum(heads, rows, upper)
    return (
        cost_open_masked((count, SCORE_BITS + fine), early=(early,))
        + found
        + cost_exponential(count, ring)
        + cost_rescale(count, ring - (window.out_frac - WEIGHT_FRAC), 0, bits)
    )


def cost_bounded_exponentials(heads: int, rows: Rows, bits: int, within: RowRange, *, at_once: bool = False) -> Declared:
    """Opening, exponential, extension."""
    count, (window, ring) = heads * rows.count, _exp_ring(within.window, bits, at_once)
    last = cost_rescale(count, ring - (window.out_frac - WEIGHT_FRAC), 0, bits)
    return cost_open_masked((count, within.score_bits)) + cost_exponential(count, ring, window.low) + last


def _cost_inverse(heads: int, rows: Rows, from_bits: int, bits: int, within: RowRange | None = None) -> Declared:
    """The reciprocals of the rows' sums, opened."""
    count, (bound, exact, finer) = heads * rows.number, _bounds(rows, within)
    return cost_reciprocal(count, from_bits, WEIGHT_FRAC - finer, bound, bits, exact) + cost_open_masked((count, bits))


def cost_softmax(heads: int, rows: Rows, from_bits: int, from_frac: int, bits: int, frac: int, *, early: bool = False) -> Declared:
    """Rescaling, exponentials, their opening beside the reciprocals, rescaling."""
    count = heads * rows.count
    product = WEIGHT_FRAC + RECIPROCAL_FRAC
    ring = product + 3
    first = cost_rescale(count, from_bits, from_frac - FRAC, SCORE_BITS, early=early)
    still_early = early and first == Declared()
    return (
        first
        + cost_exponentials(heads, rows, ring, early=still_early)
        + cost_open_masked((count, ring)).beside(_cost_inverse(heads, rows, ring, ring))
        + cost_multiply(count, ring)
        + cost_rescale(count, ring, product - frac, bits)
    )


def cost_attention(heads: int, width: int, rows: Rows, rings: AttentionRings, *, at_once: bool = False) -> Declared:
    """From opened q, k and v to the normalised sums."""
    outputs, product_bits, ring = heads * rows.number * width, rings.product_ring(rows), rings.weights_ring(rows)
    sums = (
        cost_open_masked((heads * rows.count, ring))
        + cost_weighted(heads, rows, width, ring)
        + cost_rescale(outputs, ring, WEIGHT_FRAC + rings.v_frac - rings.sum_frac, product_bits)
        + cost_open_masked((outputs, product_bits))
    )
    if rings.within is None:
        weights = cost_exponentials(heads, rows, ring, at_once=at_once, fine=rings.score_fine)
    else:
        weights = cost_bounded_exponentials(heads, rows, ring, rings.within, at_once=at_once)
    return (
        cost_scores(heads, rows, rings.qk_bits)
        + cost_rescale(heads * rows.count, rings.qk_bits, rings.q_frac + rings.k_frac - rings.score_frac, rings.score_bits)
        + weights
        + sums.beside(_cost_inverse(heads, rows, ring, product_bits, rings.within))
        + cost_multiply(outputs, product_bits)
        + cost_rescale(outputs, product_bits, rings.sum_frac + rings.reciprocal_frac - rings.out_frac, rings.out_bits)
    )
