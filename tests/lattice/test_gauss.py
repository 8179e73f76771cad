"""Discrete Gaussians against exact probabilities, and compiled draws against draws by Python's integers."""

from __future__ import annotations

import math
from bisect import bisect_right
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from protocols import security
from protocols.lattice import draws, gauss, noise

COUNT = 400_000


def distance(found: Any, deviation: float, centre: float = 0.0, width: int = 1) -> float:
    """Pearson's statistic of integers in classes of `width`, less its one-in-10^6 quantile (Wilson, Hilferty)."""
    most = math.ceil(14 * deviation)
    values = np.arange(-most, most + 1)
    weights = np.exp(-((values + centre) ** 2) / (2 * deviation**2))
    expected = np.bincount((values + most) // width, weights / weights.sum() * found.size)
    counts = np.bincount((found + most) // width, minlength=expected.size)
    middle = np.flatnonzero(expected >= 20)
    inner = slice(middle[0], middle[-1] + 1)
    ends = expected[: middle[0]].sum() + expected[middle[-1] + 1 :].sum()
    rest = counts[: middle[0]].sum() + counts[middle[-1] + 1 :].sum()
    statistic = ((counts[inner] - expected[inner]) ** 2 / expected[inner]).sum() + (rest - ends) ** 2 / max(ends, 20)
    free = middle.size
    return float(statistic - free * (1 - 2 / (9 * free) + 4.76 * math.sqrt(2 / (9 * free))) ** 3)


@pytest.mark.parametrize(("deviation", "width"), [(security.HINT, 1), (float(gauss.BASE), 128)])
def test_narrow_ones_have_their_probabilities(deviation: float, width: int) -> None:
    found = gauss.narrow(noise.fresh(), COUNT, deviation)
    assert distance(found, deviation, width=width) < 0
    assert distance(found, deviation * 1.03, width=width) > 0 and distance(found, deviation, 0.04 * deviation, width) > 0


@pytest.mark.parametrize(("deviation", "centre"), [(security.HINT, Fraction(0)), (4.0, Fraction(-15, 32)), (256.0, Fraction(0))])
def test_tables_are_right_to_their_last_bits(deviation: float, centre: Fraction) -> None:
    of = gauss.table(deviation, centre)
    assert deviation * 13.2 < -of.first < deviation * 13.5 + 2 and len(of.exact) == 1 - 2 * of.first
    with localcontext() as context:
        context.prec = 70
        scale, shift = 2 * Decimal(deviation) ** 2, Decimal(centre.numerator) / centre.denominator
        weights = [(-((k + of.first + shift) ** 2) / scale).exp() for k in range(len(of.exact))]
        total, running = sum(weights), Decimal(0)
        for weight, found in zip(weights, of.exact, strict=True):
            running += weight
            assert abs(running / total * (1 << 128) - found) < 2


def whole(limbs: Any, deviation: float) -> list[int]:
    return [sum(int(x) << gauss.LIMB * i for i, x in enumerate(each)) - gauss.offset_of(deviation) for each in limbs.T]


@pytest.mark.parametrize(("deviation", "shift"), [(1500.0, 0), (2.0**66.4, 56)])
def test_wide_ones_have_their_probabilities(deviation: float, shift: int) -> None:
    real = gauss.BASE * math.sqrt(sum(m * m for m in gauss.multipliers(deviation)))
    assert real >= deviation and (real < deviation * 1.001 or not shift)
    found = np.array([x >> shift for x in whole(gauss.wide(noise.fresh(), COUNT, deviation), deviation)])
    scaled, centre = real / (1 << shift), 0.5 if shift else 0.0
    assert distance(found, scaled, centre, 256) < 0 < distance(found, scaled * 1.03, centre, 256)


@pytest.mark.parametrize("bits", [11, 18, 40, 64, 66.5, 90, 140, 160.2])
def test_a_sum_of_wide_ones_is_one_by_the_smoothing_of_its_relations(bits: float) -> None:
    terms, reached = gauss.multipliers(2.0**bits), 0.0
    for m in terms:
        assert m <= max(1.0, reached / 2)
        reached = math.hypot(reached, m * gauss.BASE)
    assert reached >= 2.0**bits and sum(terms) * gauss.BASE * 16 < gauss.offset_of(2.0**bits)


@pytest.mark.parametrize("ratio", [Fraction(0), Fraction(1, 2), Fraction(-1, 2), Fraction(1, 3), Fraction(-(3 << 60) + 1, 1 << 64)])
def test_cosets_have_their_probabilities(ratio: Fraction) -> None:
    found = gauss.coset(noise.fresh(), np.full(COUNT, float(ratio)), lambda i: ratio)
    assert distance(found, security.COSET, float(ratio)) < 0
    assert distance(found, security.COSET * 1.03, float(ratio)) > 0 and distance(found, security.COSET, float(ratio) + 0.2) > 0


class Halves:
    """A stream of one word, for ever."""

    def __init__(self, word: int) -> None:
        self.word = word

    def raw(self, size: int) -> Any:
        return np.full(size // 8, self.word, np.uint64).view(np.uint8)


def test_compiled_draws_are_those_of_integers() -> None:
    words = noise.fresh().raw(8 * 3000).view(np.uint64)
    for deviation in (security.HINT, float(gauss.BASE)):
        of, out = gauss.table(deviation), np.empty(words.size, np.int64)
        assert of.exact[-1] == 1 << 128 and draws.gaussians(words, of.upper, of.first, of.guide, of.shift, out) == 0
        assert out.tolist() == [of.first + bisect_right(of.exact, int(w) << 64) for w in words]

    class Words(Halves):
        def raw(self, size: int) -> Any:
            return np.resize(words.view(np.uint8), size)

    stream: Any = Words(0)
    deviation, terms = 2.0**66.4, gauss.multipliers(2.0**66.4)
    of = gauss.table(float(gauss.BASE))
    values = [of.first + bisect_right(of.exact, int(w) << 64) for w in words]
    found = whole(gauss.wide(stream, 200, deviation), deviation)
    assert found == [sum(m * values[i * len(terms) + k] for k, m in enumerate(terms)) for i in range(200)]
    ratios = [Fraction(k, 997) for k in range(-498, 499)]
    every = gauss.coset(stream, np.array([float(x) for x in ratios]), lambda i: ratios[i]).tolist()
    at, slow = 0, []
    for ratio in ratios:
        while (value := gauss.attempt(Halves(0), int(words[at]), int(words[at + 1]), ratio, float(ratio))) is None:  # type: ignore[arg-type]
            at += 2
        slow.append(value)
        at += 2
    assert every == slow and at > 2 * len(ratios)


def test_a_word_that_does_not_tell_is_decided_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    of = gauss.table(security.HINT)
    bound = 40
    word, out = np.array([of.exact[bound] >> 64], np.uint64), np.empty(1, np.int64)
    assert draws.gaussians(word, of.upper, of.first, of.guide, of.shift, out) == 1 and out[0] == draws.UNDECIDED
    low = of.exact[bound] & ((1 << 64) - 1)
    for rest, value in ((low - 1, bound), (low, bound + 1)):
        assert gauss._decided(of, int(word[0]), Halves(rest)) == of.first + value  # type: ignore[arg-type]
    # nor a coin whose 64 bits are those of the probability
    centres, at = gauss._centred(), Fraction(6, gauss.CENTRES)
    value = gauss._decided(centres.tables[6 + gauss.CENTRES // 2], 1 << 63, Halves(0))  # type: ignore[arg-type]
    with localcontext() as context:
        context.prec = 60
        exponent = (value + at) * (Fraction(1, 5) - at) / security.COSET**2 + Fraction(centres.bound)
        chance = int((-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp() * (1 << 128))
    coin, low = divmod(chance, 1 << 64)
    for rest, told in ((low - 1, value), (low + 1, None)):
        assert gauss.attempt(Halves(rest), 1 << 63, coin, Fraction(1, 5), 0.2) == told  # type: ignore[arg-type]
    # a float that is never sure: all of it by integers, with the same probabilities
    monkeypatch.setattr(gauss, "NEAR", 2.0)
    ratio = Fraction(1, 5)
    found = gauss.coset(noise.fresh(), np.full(5000, 0.2), lambda i: ratio)
    assert distance(found, security.COSET, 0.2) < 0 < distance(found, security.COSET, 1.0)
