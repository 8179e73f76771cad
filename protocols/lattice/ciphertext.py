"""Keys of one session for one ring, encryptions of zero, and how residues travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from protocols import security
from protocols.correlations import Role
from protocols.errors import TransportError
from protocols.lattice import gauss, kernels, noise
from protocols.lattice.noise import Array
from protocols.lattice.parameters import Budget
from protocols.lattice.rings import Base, reduced, times, wrapped
from protocols.lattice.rings import field as field_of
from protocols.prg import SEED_BYTES, Prg, Stream, derive, new_seed
from protocols.ring import blank
from protocols.rounds import Item

SEED_WORDS = SEED_BYTES // 8


def seed_item(sender: Role, seed: bytes | None) -> Item:
    """A public seed."""
    value = blank(SEED_WORDS) if seed is None else torch.from_numpy(np.frombuffer(seed, np.int64).copy())
    return Item(value, 64, from_server=sender is Role.SERVER, from_client=sender is Role.CLIENT)


def seed_of(value: Tensor) -> bytes:
    """The inverse."""
    return value.numpy().tobytes()


def residue_items(sender: Role, rows: Sequence[Array] | None, shape: tuple[int, ...], primes: Sequence[int]) -> list[Item]:
    """Residues modulo several primes, an item each; None where this party has none to send."""
    values = [blank(*shape) if rows is None else torch.from_numpy(np.ascontiguousarray(rows[i])) for i in range(len(primes))]
    server = sender is Role.SERVER
    return [Item(v, p.bit_length(), from_server=server, from_client=not server) for v, p in zip(values, primes, strict=True)]


def residues_of(values: Sequence[Tensor], primes: Sequence[int], sender: Role) -> list[Array]:
    """What arrived, checked: TransportError for a residue that is none."""
    found = [value.numpy() for value in values]
    for row, p in zip(found, primes, strict=True):
        if row.size and int(row.max()) >= p:
            raise TransportError("a ciphertext has residues out of range", peer=sender.value, remedy="compare the versions of both parties")
    return found


def uniform_rows(seed: bytes, first: int, count: int, budget: Budget) -> list[Array]:
    """Polynomials `first` to `first + count` of a public seed, (count, N) for each prime, as values of the whole transform."""
    prg, primes, degree = Prg(seed), np.array(budget.primes, np.int64), budget.degree
    out = np.empty((len(primes), count, degree), np.int64)
    word = np.dtype(np.uint32 if max(budget.primes) < 1 << 32 else np.uint64)
    # as many words for each prime as hold enough, but one time in 2^40
    masks = np.array([(1 << p.bit_length()) - 1 for p in budget.primes], np.int64)
    sizes = [
        math.ceil(degree / r + 8 * math.sqrt(degree * (1 - r)) / r) + 8
        for r in (p / (m + 1) for p, m in zip(budget.primes, masks.tolist(), strict=True))
    ]
    ends = np.cumsum(sizes)
    for k in range(count):
        stream = prg.stream(first + k)
        words = stream.raw(int(ends[-1]) * word.itemsize).view(word)
        for i in kernels.accept_all(words, ends, masks, primes, out[:, k]):
            out[i, k] = noise.uniform(stream, degree, budget.primes[i])
    return list(out)


def transformed(x: Array, budget: Budget, primes: Sequence[int] | None = None) -> list[Array]:
    """Small integers (..., N) as values modulo each prime."""
    return [field_of(p, budget.degree).forward(reduced(x, p)) for p in primes or budget.primes]


@dataclass(slots=True)
class Keys:
    """Of one direction: at the holder secrets, at the other party public keys b_j = -a s_j + e_j; all as values, (L, N) each."""

    budget: Budget
    count: int = 0
    seed: bytes = b""
    secrets: list[list[Array]] = field(default_factory=list, repr=False)
    public: list[list[Array]] = field(default_factory=list, repr=False)

    def missing(self, count: int) -> int:
        """How many secrets are yet to be made for `count` of them; they count as made from now on."""
        found = max(0, count - self.count)
        self.count += found
        return found

    def make(self, count: int, stream: Stream) -> list[Array]:
        """The holder makes so many more secrets; their public keys, (count, N) for each prime."""
        ring, degree = self.budget, self.budget.degree
        self.seed = self.seed or new_seed()
        a = uniform_rows(derive(self.seed, "public key"), 0, 1, ring)
        out = [np.empty((count, degree), np.int64) for _ in ring.primes]
        for k in range(count):
            secret = transformed(noise.secret(stream, degree), ring)
            error = transformed(noise.errors(stream, degree), ring)
            self.secrets.append(secret)
            for row, p, s, e, pa in zip(out, ring.primes, secret, error, a, strict=True):
                row[k] = reduced(e - times(pa, s[None], p)[0, 0], p)
        return out

    def receive(self, seed: bytes, rows: Sequence[Array]) -> None:
        """The other party keeps them."""
        self.seed = self.seed or seed
        for k in range(len(rows[0])):
            self.public.append([row[k] for row in rows])

    def zeros(self, rows: int, count: int, stream: Stream) -> list[Array]:
        """Encryptions of zero without their last errors, a u and b_j u: (rows, 1 + count, N) as values modulo each prime."""
        a = uniform_rows(derive(self.seed, "public key"), 0, 1, self.budget)
        keys = [np.stack([a[i][0], *(key[i] for key in self.public[:count])]) for i in range(len(a))]
        return zeros(keys, rows, self.budget, stream)


def zeros(keys: Sequence[Array], rows: int, budget: Budget, stream: Stream) -> list[Array]:
    """The same from public keys (a and b_j, N), as values modulo each prime."""
    u = transformed(gauss.narrow(stream, rows * budget.degree, security.HINT).reshape(rows, budget.degree), budget)
    return [times(x, key, p) for x, key, p in zip(u, keys, budget.primes, strict=True)]


NEAR = 2.0**-38
"""How near to a bound, in units of what is kept, a float does not tell on which side of it a coefficient is: its error is below 2^-41."""


def fine_bits(deviation: float) -> int:
    """Bits below 1 of a grid that is at most 2^-64 of this deviation, in whole limbs."""
    return gauss.LIMB * max(0, math.ceil((64 - math.log2(deviation)) / gauss.LIMB))


def hide(second: Sequence[Array], budget: Budget, base: Base, stream: Stream) -> tuple[Array, Array]:
    """Adds what hides (`hiding`) to each coefficient of c0, residues modulo each prime, in place, and rounds.

    Of P c0 / Q the integer part, modulo each prime of P, and `low_bits` of the fraction. The grid of what is added is 2^-64 of its
    deviation or finer, so that below a unit of c0 there may be `fine_bits` of it.
    """
    fine = fine_bits(budget.hiding.deviation)
    wide = budget.hiding.deviation * 2.0**fine
    limbs = gauss.wide(stream, second[0].size, wide)
    below, above = limbs[: fine // gauss.LIMB], limbs[fine // gauss.LIMB :]
    offset = gauss.offset_of(wide) >> fine
    for x, p in zip(second, budget.primes, strict=True):
        weights = np.array([pow(2, gauss.LIMB * k, p) for k in range(len(above))], np.int64)
        kernels.plus_limbs(x.reshape(-1), above, weights, offset % p, p)
    found = np.stack(second)
    whole, part = base.fraction(found, budget.primes)
    if fine:
        for k, limb in enumerate(below):
            part += (limb * (base.modulus / math.prod(budget.primes) * 2.0 ** (gauss.LIMB * k - fine))).reshape(part.shape)
        over = part >= 1
        part -= over
        whole = base.plus(whole, over)
    part *= 1 << budget.low_bits
    low = part.astype(np.int64)
    for i in np.flatnonzero(np.abs(part - np.rint(part)).reshape(-1) < NEAR):
        _exactly(found.reshape(len(found), -1), below, budget, base, int(i), (whole.reshape(len(whole), -1), low.reshape(-1)))
    return whole, low


def _exactly(residues: Array, below: Array, budget: Budget, base: Base, i: int, out: tuple[Array, Array]) -> None:
    """The i-th coefficient's integer part and low bits, by Python's integers."""
    big, value = math.prod(budget.primes), 0
    for row, p in zip(residues, budget.primes, strict=True):
        value += int(row[i]) * (big // p) * pow(big // p, -1, p)
    value, one = value % big, big
    for limb in below[::-1]:
        value, one = (value << gauss.LIMB) + int(limb[i]), one << gauss.LIMB
    whole, rest = divmod(value * base.modulus, one)
    out[0][:, i] = [whole % p for p in base.primes] or [wrapped(whole)]
    out[1][i] = (rest << budget.low_bits) // one
