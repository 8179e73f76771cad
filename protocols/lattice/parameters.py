"""Which ring a product takes: degree, moduli, flood, and what of an answer's low bits is dropped; from public sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from protocols import security
from protocols.lattice.kernels import WIDEST_PRIME
from protocols.lattice.rings import packed_primes

VARIANCE = 10.5
"""Of an error's coefficient (`noise.errors`); with the random rounding of a message, at most 1/4 more."""


HEAVIEST = 0.7
"""Part of a secret's coefficients that are none zeros, at most (`noise.secret`)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A ciphertext's ring and what happens to an answer in it.

    An answer's c0 + c1 s is Q/P m + noise + flood, the flood uniform in [-F, F) with 2 F = top 2^low. c1 is rounded to the modulus
    `coarse`, the
    product of the first `keep` primes, or 2^w where there are none, and c0 to `low_bits` bits below a unit of m.
    """

    degree: int
    primes: tuple[int, ...]
    keep: int
    coarse: int
    flood: tuple[int, int]
    low_bits: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The primes of an answer's c1."""
        return self.primes[: self.keep]

    @property
    def flood_half(self) -> int:
        """F."""
        return (self.flood[0] << self.flood[1]) // 2

    def margin(self, plain: int, rms: float) -> float:
        """What is left of half a unit of m at the worst: more than 0, or an answer could be wrong.

        Noise and roundings at `security.TAIL` standard deviations, beyond which one coefficient in 2^71 lies; the flood at its end.
        """
        delta = math.prod(self.primes) / plain
        rounding = rounding_tail(self.degree) * plain / self.coarse
        return 0.5 - (self.flood_half + security.TAIL * rms) / delta - rounding - 2.0 ** -(self.low_bits + 1)


def rounding_tail(degree: int) -> float:
    """What rounding c1 adds to c1 s at most: errors uniform in [-1/2, 1/2] times the ones of s, at the tail."""
    return security.TAIL * math.sqrt(HEAVIEST * degree / 12)


def limit(degree: int) -> int:
    """Bits of Q at most, by the HE standard."""
    return security.HE_STANDARD.get(degree, 0)


def zero_rms(degree: int) -> float:
    """Standard deviation of what an encryption of zero under a public key adds: e u + e0 + e1 s, u and s ternary."""
    return math.sqrt(VARIANCE * (2 * degree + 1))


def flood_for(rms: float) -> tuple[int, int]:
    """(top, low) for noise of this standard deviation."""
    half = math.ceil(rms * 2.0**security.FLOOD_BITS)
    low = max(0, (2 * half).bit_length() - 16)
    return -(-2 * half // (1 << low)), low


def budget(degree: int, plain: int, rms: float, *, without: tuple[int, ...] = ()) -> Budget | None:
    """The smallest ring that hides noise of at most this standard deviation and still decrypts; None where this degree does not reach.

    The flood takes a quarter of a unit of m, and rounding c1 to as many primes as are kept at most a sixteenth.
    """
    flood, widest = flood_for(rms), WIDEST_PRIME - 1
    bits = math.log2(plain) + math.log2(flood[0]) + flood[1] - 1 + 2
    if bits > limit(degree):
        return None
    kept = packed_primes(math.log2(plain) + 4 + math.log2(rounding_tail(degree)), 2 * degree, widest, without)
    rest = bits - sum(math.log2(p) for p in kept)
    primes = kept
    if rest > 0:
        primes += packed_primes(rest, 2 * degree, widest, (*without, *kept))
    found = Budget(degree, primes, len(kept), math.prod(kept), flood, 4)
    if math.log2(math.prod(primes)) > limit(degree):
        return None
    assert found.margin(plain, rms) > 0
    return found


NARROW = 23
"""Bits of the primes of encrypted weights, at most: sums of 256 products of a residue and a centred one are exact in float64."""


@cache
def weight_budget(bits: int, rms: float) -> Budget | None:
    """The smallest ring of narrow primes for messages in Z_2^bits, c1 rounded to 2^w, w - bits as few as the rounding allows.

    Rounding c1 takes less than 0.43 of a unit of m, c0's 1/64, the flood 1/32. None where no degree of the standard reaches.
    """
    flood = flood_for(rms)
    needed = bits + math.log2(flood[0]) + flood[1] - 1 + 5
    for degree in security.HE_STANDARD:
        if needed > limit(degree):
            continue
        spare = math.ceil(math.log2(rounding_tail(degree) / 0.43))
        primes = packed_primes(needed, 2 * degree, NARROW)
        if math.log2(math.prod(primes)) > limit(degree):
            continue
        found = Budget(degree, primes, 0, 1 << (bits + spare), flood, 5)
        assert found.margin(1 << bits, rms) > 0
        return found
    return None
