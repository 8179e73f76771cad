"""Discrete Gaussians from streams: narrow ones by a table, wide ones as sums of narrow ones, and on cosets.

A table holds cumulative probabilities to 128 bits; what is cut off beyond weighs less. A word of 64 random bits nearly always tells a
value; where it does not, because it equals the upper half of a bound, 64 bits more do, exactly (`_decided`), in Python: timing is this
party's own. Wide (Micciancio, Peikert: CRYPTO 2013; Micciancio, Walter: CRYPTO 2017): x_0 + 2^9 x_1 + 2^18 x_2 ..., all x of deviation
2^10, the last one's multiplier at most half of the deviation of the sum before it: a Gaussian up to 2^-113, by the smoothing of the lattice
of relations. On cosets: a Gaussian around the nearest of 32 centres from a table, accepted with the probability that is left, by a float
that is right to 2^-48, and where a uniform word is nearer than that to it, by 64 bits more and 40 decimals.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from protocols import security
from protocols.lattice import draws
from protocols.lattice.noise import Array
from protocols.prg import Stream

CUT = 13.3
"""Deviations beyond which a Gaussian has less than 2^-125."""
BASE = 1 << 10
"""Deviation of the terms of wide ones."""
STEP = 9
"""Bits from term to term."""
LIMB = 40
"""Bits of a limb of a wide one."""
CENTRES = 32
"""Centres of tables in a unit."""
NEAR = 2.0**-46
"""How near a word is told from a float."""
_FINE = 160  # bits of fixed-point numbers
_WORDS = 1 << 17


class Table(NamedTuple):
    """Cumulative probabilities in units of 2^-128, their upper words, the first one's value, and where words of each upper part begin."""

    exact: tuple[int, ...]
    upper: Any
    first: int
    guide: Any
    shift: int


def _power(exponent: Fraction) -> int:
    """e^-exponent in units of 2^-_FINE."""
    with localcontext() as context:
        context.prec = 60
        value = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
        return int(value * Decimal(1 << _FINE))


@cache
def table(deviation: float, centre: Fraction = Fraction(0)) -> Table:
    """Of the Gaussian on Z with this deviation around -centre: weights rho(k + centre)."""
    variance2 = 2 * Fraction(deviation) ** 2
    most = math.ceil(CUT * deviation) + 1
    # weights by two factors: w_(k+1) = w_k r_k, r_(k+1) = r_k q
    weights = []
    for sign in (1, -1):
        value, ratio = _power(centre**2 / variance2), _power((1 + 2 * sign * centre) / variance2)
        q, found = _power(Fraction(2) / variance2), [value]
        for _ in range(most):
            value = value * ratio >> _FINE
            ratio = ratio * q >> _FINE
            found.append(value)
        weights.append(found)
    row = weights[1][:0:-1] + weights[0]
    total, running, exact = sum(row), 0, []
    for weight in row:
        running += weight
        exact.append((running << 128) // total)
    shift = 64 - min(14, len(exact).bit_length() + 2)
    upper = np.array([min(x >> 64, (1 << 64) - 1) for x in exact], np.uint64)
    guide = np.searchsorted(upper, np.arange(1 << (64 - shift), dtype=np.uint64) << np.uint64(shift)).astype(np.int32)
    return Table(tuple(exact), upper, -most, guide, shift)


def _decided(found: Table, word: int, stream: Stream) -> int:
    """The value that a word and another after it tell."""
    rest = int(stream.raw(8).view(np.uint64)[0])
    return found.first + bisect_right(found.exact, word << 64 | rest)


def narrow(stream: Stream, count: int, deviation: float) -> Array:
    """From D_Z of this deviation, at most 2^10."""
    found, out = table(deviation), np.empty(count, np.int64)
    for start in range(0, count, _WORDS):
        part = out[start : start + _WORDS]
        words = stream.raw(8 * part.size).view(np.uint64)
        if draws.gaussians(words, found.upper, found.first, found.guide, found.shift, part):
            for i in np.flatnonzero(part == draws.UNDECIDED):
                part[i] = _decided(found, int(words[i]), stream)
    return out


@cache
def multipliers(deviation: float) -> tuple[int, ...]:
    """Of the terms of a sum of at least this deviation, and at most 2^-8 more where it is at least 2^18."""
    found, reached = [1], float(BASE)
    while reached < deviation:
        missing = math.sqrt(deviation**2 - reached**2) / BASE
        most = BASE // 2 if len(found) == 1 else found[-1] << STEP
        found.append(most if missing > most else max(1, math.ceil(missing)))
        reached = BASE * math.sqrt(sum(m * m for m in found))
    return tuple(found)


def limbs_of(deviation: float) -> int:
    """Limbs of 40 bits that such a sum takes, its offset included."""
    return -(-((sum(multipliers(deviation)) * BASE * 16).bit_length() + 1) // LIMB)


def offset_of(deviation: float) -> int:
    """What is added to a wide one, so that it is no negative number."""
    return 1 << (LIMB * limbs_of(deviation) - 1)


def wide(stream: Stream, count: int, deviation: float) -> Array:
    """From D_Z of at least this deviation, plus `offset_of`, as limbs of 40 bits, lowest first: (k, count)."""
    terms, size, base = multipliers(deviation), limbs_of(deviation), table(float(BASE))
    cut = np.array([[m >> (LIMB * i) & ((1 << LIMB) - 1) for i in range(size)] for m in terms], np.int64)
    out, each = np.empty((size, count), np.int64), max(1, _WORDS // len(terms))
    for start in range(0, count, each):
        part = out[:, start : start + each]
        words = stream.raw(8 * len(terms) * part.shape[1]).view(np.uint64)
        if draws.wide_gaussians(words, base.upper, base.first, base.guide, base.shift, cut, LIMB, part):
            for i in np.flatnonzero(part[0] == draws.UNDECIDED):
                total = offset_of(deviation)
                for m, word in zip(terms, words[i * len(terms) : (i + 1) * len(terms)].tolist(), strict=True):
                    total += m * _decided(base, word, stream)
                part[:, i] = [total >> (LIMB * k) & ((1 << LIMB) - 1) for k in range(size)]
    return out


class _Centred(NamedTuple):
    """Tables for all centres k / 32, -16 <= k <= 16, as rows, and the bound of the exponents that are left."""

    tables: tuple[Table, ...]
    upper: Any
    guide: Any
    bound: float


@cache
def _centred() -> _Centred:
    deviation = float(security.COSET)
    tables = tuple(table(deviation, Fraction(k, CENTRES)) for k in range(-CENTRES // 2, CENTRES // 2 + 1))
    most = -tables[0].first + 1
    bound = most / (2 * CENTRES) / deviation**2
    return _Centred(tables, np.stack([t.upper for t in tables]), np.stack([t.guide for t in tables]), bound)


def coset(stream: Stream, ratios: Any, exact: Callable[[int], Fraction]) -> Array:
    """g of D_Z with deviation COSET around -r/t, so that r + t g is one on r + t Z with deviation COSET t.

    `ratios`: r/t in [-1/2, 1/2], as floats; `exact(i)`: the i-th as it is, asked for where it matters.
    """
    of, variance = _centred(), float(security.COSET) ** 2
    flat = np.ascontiguousarray(ratios).reshape(-1)
    out, at = np.empty(flat.size, np.int64), 0
    first, shift = of.tables[0].first, of.tables[0].shift
    while at < flat.size:
        count = min(_WORDS // 2, (flat.size - at) + (flat.size - at) // 8 + 8)
        words, used = stream.raw(16 * count).view(np.uint64), 0
        while used < words.size and at < flat.size:
            at, used, undecided = draws.coset_gaussians(
                words, used, flat, at, of.upper, of.guide, first, shift, variance, of.bound, CENTRES, NEAR, out
            )
            if undecided:
                value = attempt(stream, int(words[used]), int(words[used + 1]), exact(int(at)), float(flat[at]))
                used += 2
                if value is not None:
                    out[at] = value
                    at += 1
    return out.reshape(np.shape(ratios))


def attempt(stream: Stream, word: int, coin: int, ratio: Fraction, near: float) -> int | None:
    """What two words tell, and those after them where it takes more: a value, or None where it is not accepted."""
    of, k = _centred(), math.floor(near * CENTRES + 0.5)
    found = _decided(of.tables[k + CENTRES // 2], word, stream)
    centre, variance = Fraction(k, CENTRES), Fraction(security.COSET) ** 2
    exponent = (found + centre) * (ratio - centre) / variance + Fraction(of.bound)
    whole = coin << 64 | int(stream.raw(8).view(np.uint64)[0])  # 64 bits alone would be off by 2^-64 in each of 2^50 draws
    return found if whole << (_FINE - 128) < _power(exponent) else None
