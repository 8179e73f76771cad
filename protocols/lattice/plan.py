"""How a batch of matrix products is laid into ciphertexts, and by which road it is made: decided from public sizes by their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from protocols.lattice.gilboa import product_bytes, transfer_bytes
from protocols.lattice.hiding import multiples
from protocols.lattice.parameters import Budget, budget
from protocols.lattice.rings import primes_for
from protocols.ring import packed_size

DEGREES = (4096, 8192, 16384, 32768)
MOST_STEPS = 1 << 11
SMALL = 1 << 16  # bytes of transfers that no ciphertext is cheaper than
PLAIN_LEAST = 24  # bits: so that the last prime's digit tells halves well enough, see `Plan.half`


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout of H products of (n, d) and (d, m) with entries in [-2^(bits-1), 2^(bits-1)).

    The plaintexts are Z_P[X]/(X^N + 1), which is Z_P[X]/(X^b - r_k) for `roots` r_k, the roots of Y^(N/b) + 1 modulo P, Y = X^b. A unit,
    one
    head and one of the `parts` of the inner dimension, has a root; b columns are its coefficients, and further columns stand
    under further secrets. A polynomial in Y alone is a scalar for each unit.
    """

    heads: int
    rows: int
    inner: int
    columns: int
    bits: int
    roots: int
    parts: int
    plain: tuple[int, ...]
    budget: Budget

    @property
    def width(self) -> int:
        """b."""
        return self.budget.degree // self.roots

    @property
    def steps(self) -> int:
        """Inner indices of one part, each a ciphertext of every group."""
        return -(-self.inner // self.parts)

    @property
    def groups(self) -> int:
        """Ciphertexts that all units take."""
        return -(-self.heads * self.parts // self.roots)

    @property
    def secrets(self) -> int:
        """Under which the columns stand, `width` of them each."""
        return -(-self.columns // self.width)

    @property
    def modulus(self) -> int:
        """P."""
        return math.prod(self.plain)

    @property
    def shift(self) -> int:
        """What is added to every output, so that it lies in [0, P/2)."""
        return self.inner << (2 * self.bits - 2)

    @property
    def half(self) -> int:
        """The last mixed radix digit from which on a share counts as at least half of P; between the outputs' bound and P/2."""
        return (self.plain[-1] - 1) // 2

    def sent(self, needed: int) -> tuple[int, int]:
        """Bytes of the ciphertexts and of the answers, of which `needed` columns (over all rows) are wanted; keys aside."""
        degree, ring = self.budget.degree, self.budget
        up = sum(packed_size(self.groups * self.steps * self.secrets * degree, p.bit_length()) for p in ring.primes)
        down = sum(packed_size(self.groups * self.rows * degree, p.bit_length()) for p in ring.kept)
        return up + 16, down + 16 + packed_size(self.groups * needed * self.roots, ring.low_bits)


def fitting(heads: int, rows: int, inner: int, columns: int, bits: int, degree: int, width: int, parts: int) -> Plan | None:
    """The layout with these columns a root and parts; None where this degree does not reach."""
    roots, steps = degree // width, -(-inner // parts)
    wanted = max(PLAIN_LEAST, math.log2(inner) + 2 * bits + 2.0**-12)
    plain = primes_for(wanted, 2 * roots, 47)
    modulus = math.prod(plain)
    secrets = -(-columns // width)
    found = budget(degree, modulus, multiples(modulus, secrets * width, steps, degree, secrets, roots), without=plain)
    return None if found is None else Plan(heads, rows, inner, columns, bits, roots, parts, plain, found)


def _parts(heads: int, inner: int, roots: int) -> list[int]:
    """Into how many parts the inner dimension may be cut: none, or as many as fill one or two groups, in equal steps."""
    found = {1}
    for groups in (1, 2):
        most = min(inner, groups * roots // heads)
        if most > 1:
            found.add(-(-inner // -(-inner // most)))
    return sorted(found)


@lru_cache(maxsize=1024)
def layout(heads: int, rows: int, inner: int, columns: int, bits: int, needed: int) -> Plan | None:
    """The layout of the fewest bytes; None where no ring of the standard is wide enough."""
    best: tuple[int, Plan] | None = None
    for degree in DEGREES:
        for log in range(min((columns - 1).bit_length(), degree.bit_length() - 2) + 1):
            width = 1 << log
            roots = degree // width
            for parts in _parts(heads, inner, roots):
                if -(-inner // parts) > MOST_STEPS:
                    continue
                plan = fitting(heads, rows, inner, columns, bits, degree, width, parts)
                if plan is None:
                    continue
                cost = sum(plan.sent(needed)) + key_bytes(plan.budget, plan.secrets)
                if best is None or cost < best[0]:
                    best = cost, plan
    return None if best is None else best[1]


def key_bytes(ring: Budget, secrets: int) -> int:
    """Of public keys under so many secrets."""
    return sum(packed_size(secrets * ring.degree, p.bit_length()) for p in ring.primes)


def choose(heads: int, rows: int, inner: int, columns: int, bits: int, needed: int) -> Plan | None:
    """The layout, or None where products one by one take fewer bytes, as far as a formula tells; `needed` outputs of a head are wanted."""
    transfers = product_bytes(heads * needed * inner, bits)
    if transfers <= SMALL:
        return None
    plan = layout(heads, rows, inner, columns, bits, needed)
    if plan is None:
        return None
    wraps = transfer_bytes(heads * needed) + heads * needed * (bits + 1) // 8
    return plan if sum(plan.sent(needed)) + key_bytes(plan.budget, plan.secrets) + wraps < transfers else None
