"""Softmax over ragged rows, and causal attention on masked wires.

The composition of `docs/protocols.md`: the scores are opened once, masked, in 21 bits, and the maximum and the
exponential read that one wire. Softmax is invariant under shifts, so that the maximum is only needed to within 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.declared import Declared
from protocols.exponential import FRAC, OUT_BITS, OUT_FRAC, cost_exponential, exponential
from protocols.maximum import cost_row_maximum, cost_upper_wire, row_maximum, upper_wire
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, cost_multiply, cost_scores, cost_weighted, multiply, scores, weighted
from protocols.reciprocal import cost_reciprocal, reciprocal
from protocols.rows import Rows
from protocols.shares import Shares, Wire
from protocols.truncation import cost_rescale, rescale

SCORE_BITS = 21  # 12 of them fraction: scores within [-128, 128) do not wrap where they are compared
DROP = 11  # the maximum is taken over the upper 10 bits, units of 1/2
WEIGHT_FRAC = 16  # of the exponentials
NARROW = 18  # their ring before they are extended
LARGEST = 1.66  # e^0.5 and the roundings: no exponential is larger
RECIPROCAL_FRAC = 20


def exponentials(party: Party, score: Shares, rows: Rows, bits: int) -> Protocol_[Shares]:
    """e^(x - m) for packed rows of scores (H, N) and an m within 1/2 of each row's maximum; in Z_2^bits, 16 fraction bits.

    Steps: the scores are opened masked in 21 bits; the maximum over the wire's upper 10 bits (`row_maximum`); the
    exponential of the difference of the two wires; truncate-reduce to 18 bits, extend to `bits`.
    Domain: scores in [-120, 120], rows of 1 to 1024. Error: 2.1e-4 absolute, where the row's largest is at least 0.6.
    Rounds: 1 + 3 a level + 1 + 1. Bytes per element, both directions: 5.25 + about 3 + 9 + 0.25.
    Learns: uniform values, both; the rows' lengths are public.
    """
    (x,) = yield from open_masked(party, [score])
    top = yield from row_maximum(party, upper_wire(party, x, DROP), rows)
    e = yield from exponential(party, x, top, rows, DROP)
    e = yield from rescale(party, e, bits=NARROW, frac=WEIGHT_FRAC)
    return (yield from rescale(party, e, bits=bits, frac=WEIGHT_FRAC, nonnegative=True))


def _inverse(party: Party, e: Shares, rows: Rows, bits: int) -> Protocol_[Wire]:
    sums = e.map(rows.sum)
    y = yield from reciprocal(party, sums, bound=LARGEST * rows.columns, bits=bits, frac=RECIPROCAL_FRAC)
    (wire,) = yield from open_masked(party, [y])
    return wire


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


def attention(party: Party, q: Wire, keys: Cached, values: Cached, rows: Rows, rings: AttentionRings) -> Protocol_[Shares]:
    """softmax(q k^T) v on masked wires: q (H, n, d), keys and values (H, m, d) -> (H, n, d), in Z_2^out_bits.

    `rows` says which elements of (n, m) exist. The sums are normalised after the product with v.
    Domain: scores in [-120, 120], results in [-64, 64) at the default rings. Error, for |v| <= V and rows of n:
    V times that of `softmax`; V n 2^-19 where a row is flat (the reciprocal has 20 fraction bits); 2^-11 by the roundings.
    Rounds: those of `exponentials`, then 1 + those of `reciprocal` (the products run beside it), then 1.
    Learns: uniform values, both.
    """
    score = scores(party, q, keys, rows, rings.qk_bits)
    score = yield from rescale(party, score, bits=SCORE_BITS, frac=FRAC)
    e = yield from exponentials(party, score, rows, rings.v_bits)

    heads, number, width = score.shape[0], rows.number, values.masked.shape[-1]

    def sums() -> Protocol_[Wire]:
        (p,) = yield from open_masked(party, [e])
        z = weighted(party, p, values, rows, rings.v_bits).map(lambda x: x.flatten(-2))  # (H, n * d)
        return (yield from _opened(party, z, rings.product_bits, rings.sum_frac))

    z, y = yield from parallel(sums(), _inverse(party, e, rows, rings.product_bits))
    out = multiply(party, z, y, rings.product_bits, Rows(width, number, 0))
    out = yield from rescale(party, out, bits=rings.out_bits, frac=rings.out_frac)
    return out.map(lambda x: x.reshape(heads, number, width))


def cost_exponentials(heads: int, rows: Rows, bits: int, *, early: bool = False) -> Declared:
    """Opening, maximum, exponential, extension."""
    count, upper = heads * rows.count, SCORE_BITS - DROP
    return (
        cost_open_masked((count, SCORE_BITS), early=(early,))
        + cost_upper_wire(count, upper)
        + cost_row_maximum(heads, rows, upper)
        + cost_exponential(count)
        + cost_rescale(count, OUT_BITS, OUT_FRAC - WEIGHT_FRAC, NARROW)
        + cost_rescale(count, NARROW, 0, bits)
    )


def _cost_inverse(heads: int, rows: Rows, from_bits: int, bits: int) -> Declared:
    """The reciprocals of the rows' sums, opened."""
    count = heads * rows.number
    return cost_reciprocal(count, from_bits, WEIGHT_FRAC, LARGEST * rows.columns, bits) + cost_open_masked((count, bits))


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


def cost_attention(heads: int, width: int, rows: Rows, rings: AttentionRings) -> Declared:
    """From opened q, k and v to the normalised sums."""
    outputs = heads * rows.number * width
    sums = (
        cost_open_masked((heads * rows.count, rings.v_bits))
        + cost_weighted(heads, rows, width, rings.v_bits)
        + cost_rescale(outputs, rings.v_bits, WEIGHT_FRAC + rings.v_frac - rings.sum_frac, rings.product_bits)
        + cost_open_masked((outputs, rings.product_bits))
    )
    return (
        cost_scores(heads, rows, rings.qk_bits)
        + cost_rescale(heads * rows.count, rings.qk_bits, rings.q_frac + rings.k_frac - FRAC, SCORE_BITS)
        + cost_exponentials(heads, rows, rings.v_bits)
        + sums.beside(_cost_inverse(heads, rows, rings.v_bits, rings.product_bits))
        + cost_multiply(outputs, rings.product_bits)
        + cost_rescale(outputs, rings.product_bits, rings.sum_frac + RECIPROCAL_FRAC - rings.out_frac, rings.out_bits)
    )
