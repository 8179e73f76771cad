"""Which ring a product takes: degree, moduli, flood, and what of an answer's low bits is dropped; from public sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocols import security
from protocols.lattice.compiled import WIDEST_PRIME
from protocols.lattice.rings import primes_for

VARIANCE = 10.5
"""Of an error's coefficient (`noise.errors`); with the random rounding of a message, at most 1/4 more."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A ciphertext's ring and what happens to an answer in it.

    An answer's c0 + c1 s is Q/P m + noise + flood, the flood uniform in [-F, F) with 2 F = top 2^low. c1 is rounded to the modulus Q', the
    product of the first `keep` primes, and c0 to `low_bits` bits below a unit of m.
    """

    degree: int
    primes: tuple[int, ...]
    keep: int
    flood: tuple[int, int]
    low_bits: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The primes of an answer's c1."""
        return self.primes[: self.keep]

    @property
    def bits(self) -> int:
        """Of one coefficient, on a wire."""
        return sum(p.bit_length() for p in self.primes)

    @property
    def flood_half(self) -> int:
        """F."""
        return (self.flood[0] << self.flood[1]) // 2

    def margin(self, plain: int, rms: float) -> float:
        """What is left of half a unit of m at the worst: more than 0, or an answer could be wrong.

        Noise and roundings at `security.TAIL` standard deviations, beyond which one coefficient in 2^71 lies; the flood at its end.
        """
        delta = math.prod(self.primes) / plain
        rounding = security.TAIL * math.sqrt(self.degree / 12) * plain / math.prod(self.kept)
        return 0.5 - (self.flood_half + security.TAIL * rms) / delta - rounding - 2.0 ** -(self.low_bits + 1)


def limit(degree: int) -> int:
    """Bits of Q at most, by the HE standard."""
    return security.HE_STANDARD.get(degree, 0)


def zero_rms(degree: int) -> float:
    """Standard deviation of what an encryption of zero under a public key adds: e u + e0 + e1 s, u and s ternary."""
    return math.sqrt(VARIANCE * (2 * degree + 1))


def budget(degree: int, plain: int, rms: float, *, without: tuple[int, ...] = (), widest: int = WIDEST_PRIME - 1) -> Budget | None:
    """The smallest that hides noise of at most this standard deviation and still decrypts; None where this degree does not reach.

    Q' is at least P 2^4 TAIL sqrt(N / 12), so that its rounding takes at most a sixteenth; the flood takes a quarter.
    """
    half = math.ceil(rms * 2.0**security.FLOOD_BITS)
    low = max(0, (2 * half).bit_length() - 16)
    flood = (-(-2 * half // (1 << low)), low)
    kept_bits = math.log2(plain) + 4 + math.log2(security.TAIL * math.sqrt(degree / 12))
    bits = math.log2(plain) + math.log2(flood[0]) + low - 1 + 2
    if bits > limit(degree):
        return None
    kept = primes_for(kept_bits, 2 * degree, widest, without)
    rest = bits - sum(math.log2(p) for p in kept)
    primes = kept
    if rest > 0:
        primes += primes_for(max(rest, math.log2(2 * degree) + 3), 2 * degree, widest, (*without, *kept))
    found = Budget(degree, primes, len(kept), flood, 4)
    if math.log2(math.prod(primes)) > limit(degree):
        return None
    assert found.margin(plain, rms) > 0
    return found
