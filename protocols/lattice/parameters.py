"""Which ring a product takes: degree, moduli, noise, and what of an answer's low bits is dropped; from public sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from protocols import security
from protocols.lattice.hiding import Hiding, multiples, row
from protocols.lattice.kernels import WIDEST_PRIME
from protocols.lattice.rings import packed_primes

HEAVIEST = 0.7
"""Part of a secret's coefficients that are none zeros, at most (`noise.secret`)."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A ciphertext's ring and what happens to an answer in it.

    c1 is rounded to the modulus `coarse`, the product of the first `keep` primes, or 2^w where there are none, and c0 to `low_bits` bits
    below a unit of m.
    """

    degree: int
    primes: tuple[int, ...]
    keep: int
    coarse: int
    hiding: Hiding
    low_bits: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The primes of an answer's c1."""
        return self.primes[: self.keep]

    def margin(self, plain: int) -> float:
        """What is left of half a unit of m at the tail, beyond which one coefficient in 2^64 lies: more than 0, or answers could be wrong.

        Noise and the rounding of c1 are independent and subgaussian, so that their squares add up.
        """
        noise = self.hiding.noise * plain / math.prod(self.primes)
        rounding = rounding_rms(self.degree) * plain / self.coarse
        return 0.5 - security.TAIL * math.hypot(noise, rounding) - 2.0 ** -(self.low_bits + 1)


def noise_bits(degree: int, plain: int, coarse: float, low_bits: int) -> float:
    """log2 of how much wider than the noise a unit of m must be where c1 is rounded to this modulus."""
    room = (0.5 - 2.0 ** -(low_bits + 1)) / security.TAIL
    return -math.log2(math.sqrt(room**2 - (rounding_rms(degree) * plain / coarse) ** 2)) + 0.01


def rounding_rms(degree: int) -> float:
    """Standard deviation of what rounding c1 adds to c1 s: errors uniform in [-1/2, 1/2] times the ones of s."""
    return math.sqrt(HEAVIEST * degree / 12)


def limit(degree: int) -> int:
    """Bits of Q at most, by the HE standard."""
    return security.HE_STANDARD.get(degree, 0)


def budget(degree: int, plain: int, hiding: Hiding, *, without: tuple[int, ...] = ()) -> Budget | None:
    """The smallest ring that takes this noise and still decrypts; None where this degree does not reach.

    At the tail, rounding c1 to as many primes as are kept takes at most three tenths of a unit of m.
    """
    widest = WIDEST_PRIME - 1
    coarse = math.log2(plain) + math.log2(security.TAIL * rounding_rms(degree) / 0.3)
    if math.log2(plain) + math.log2(hiding.noise) > limit(degree):
        return None
    kept = packed_primes(coarse, 2 * degree, widest, without)
    bits = math.log2(plain) + math.log2(hiding.noise) + noise_bits(degree, plain, math.prod(kept), 3)
    rest = bits - sum(math.log2(p) for p in kept)
    primes = kept
    if rest > 0:
        primes += packed_primes(rest, 2 * degree, widest, (*without, *kept))
    found = Budget(degree, primes, len(kept), math.prod(kept), hiding, 3)
    if math.log2(math.prod(primes)) > limit(degree):
        return None
    assert found.margin(plain) > 0
    return found


NARROW = 23
"""Bits of the primes of encrypted weights, at most: sums of 256 products of a residue and a centred one are exact in float64."""


@cache
def weight_budget(bits: int, inner: int, outer: int, chosen: bool = False) -> Budget | None:
    """The smallest ring of narrow primes for a matrix of Z_2^bits, (inner, outer), or a table of `chosen` rows, answers hidden by `hiding`.

    c1 is rounded to 2^w, w - bits as few as the rounding allows: it takes less than 0.43 of a unit of m at the tail. None where no degree
    of the standard reaches.
    """
    low = 4 if chosen else 3  # below a unit of m: one less costs the ring of few outputs a bit
    for degree in security.HE_STANDARD:
        secrets = -(-outer // degree)
        hiding = row(outer, degree, secrets) if chosen else multiples(1 << bits, outer, inner, degree, secrets)
        coarse = 1 << (bits + math.ceil(math.log2(security.TAIL * rounding_rms(degree) / 0.43)))
        needed = bits + math.log2(hiding.noise) + noise_bits(degree, 1 << bits, coarse, low)
        if needed > limit(degree):
            continue
        primes = packed_primes(needed, 2 * degree, NARROW)
        if math.log2(math.prod(primes)) > limit(degree):
            continue
        found = Budget(degree, primes, 0, coarse, hiding, low)
        assert found.margin(1 << bits) > 0
        return found
    return None
