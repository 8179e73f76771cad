"""Rows of a linear map's masks and shares, made many at a time for any later query: no ciphertext of the weight is needed.

Source: the second road of this project's design, `linear` with the roles changed. R (rows, inner) is C's, W (inner, outer) S's. Steps:

1. C encrypts the columns of R, `degree` rows to a ciphertext; further rows stand under further secrets, all under one a_i. It sends a's
   seed, public keys b_j, and of each b_i what is below a unit of the message: the upper part is a public seed's stream T, and R is what
   makes that true, R = T - w for the upper part w of e - a s.
2. S sums W_ij times these over i: scalars, so that no transform is needed, and sends for every output j what `linear.exchange` does: one c1
   for all secrets, and a few bits of each row's c0.

So a row costs C log Q - bits an input, and S `low_bits` an output, and a c1 an output for as many rows as there are. Learns: S ciphertexts
(RLWE) and nothing else: given a, T and what is below, w is as good as uniform, and so is R. Only where what is below lies within three of
Q's units, or 2^-50 of a message's, of either end, one element of R in 2^48 or so at 40 bits, does it tell about one bit of w. C answers
that are hidden as those of `linear` (`hiding`), a column of W in the place of C's r: S takes each W_ij on its coset, anew for every stock,
and E are C's errors, each a binomial and a centred rounding coin, whatever w and T are. Either's share of a corrupted party is fixed by its
own view, which the ideal functionality lets it choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.errors import TransportError
from protocols.lattice import noise
from protocols.lattice.ciphertext import residue_items, residues_of, seed_item, seed_of, transformed
from protocols.lattice.linear import combined, exchange
from protocols.lattice.noise import Array
from protocols.lattice.parameters import Budget
from protocols.lattice.rings import Base, plus, reduced, times
from protocols.lattice.rings import field as field_of
from protocols.lattice.weights import PUBLIC_KEY, EncryptedWeight, Form, InMemory, LatticeKeys, Small, WeightKeys, polynomials
from protocols.prg import SEED_BYTES, Prg, Stream, derive, new_seed
from protocols.ring import blank, known, packed_size, reduce, signed
from protocols.rounds import Item, Protocol_

ELEMENTS = 1 << 21
"""Of the ciphertexts' coefficients that travel in one message, about."""
SLACK = 20
"""The part below a unit is sent with 2^-20 of a unit to spare on both sides: more than a float64 can be wrong about where it ends."""


@dataclass(frozen=True)
class Rows:
    """What is public of so many rows of one map: x (inner) to (outer), modulo 2^bits."""

    name: str
    inner: int
    outer: int
    bits: int
    count: int
    transposed: bool = False

    @cached_property
    def form(self) -> Form:
        """Of R's columns as a matrix that C has encrypted."""
        return Form(self.name, self.inner, self.count, self.bits)

    @property
    def budget(self) -> Budget:
        """The ring; ConfigError where there is none."""
        return self.form.budget

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """Bits of the mixed radix digits, modulo the first primes, of what is below a unit."""
        primes, left, found = iter(self.budget.primes), self.below, list[int]()
        while left > 1:
            p = next(primes)
            found.append((min(p, left) - 1).bit_length())
            left = -(-left // p)
        return tuple(found)

    @cached_property
    def margin(self) -> int:
        """See `SLACK`."""
        return (math.prod(self.budget.primes) >> (self.bits + SLACK)) + 2

    @property
    def below(self) -> int:
        """What is below a unit is less than this, its margins included."""
        return (math.prod(self.budget.primes) >> self.bits) + 2 * self.margin + 2

    def inputs(self) -> Iterator[slice]:
        """Inner indices whose ciphertexts travel together."""
        size = max(1, ELEMENTS // self.count)
        return (slice(start, min(self.inner, start + size)) for start in range(0, self.inner, size))

    def outputs(self) -> Iterator[slice]:
        """Outputs whose answers travel together."""
        size = max(1, ELEMENTS // max(self.count, self.budget.degree))
        return (slice(start, min(self.outer, start + size)) for start in range(0, self.outer, size))

    @property
    def alone(self) -> int:
        """Bytes of as many rows that are made from W's ciphertexts (`linear`), without those."""
        form = Form(self.name, self.inner, self.outer, self.bits, self.transposed)
        ring = form.budget
        return sum(packed_size(self.count * ring.degree, w) for w in form.limbs) + packed_size(self.count * self.outer, ring.low_bits)

    @cached_property
    def size(self) -> int:
        """Payload of making them, bytes of both directions."""
        ring, form = self.budget, self.form
        found = form.key_bytes + SEED_BYTES
        found += sum(packed_size((part.stop - part.start) * self.count, w) for part in self.inputs() for w in self.digits)
        for part in self.outputs():
            count = part.stop - part.start
            found += SEED_BYTES + sum(packed_size(count * ring.degree, w) for w in form.limbs)
            found += packed_size(count * self.count, ring.low_bits)
        return found


class _Columns(EncryptedWeight):
    """What S has of R's columns while it answers: in memory, (inner, count) for each prime."""

    def __init__(self, rows: Rows, seed: bytes, public: list[Small]) -> None:
        super().__init__(rows.form, seed, public, InMemory())
        self.held = [np.empty((rows.inner, rows.count), np.int32) for _ in rows.budget.primes]

    def rows(self, prime: int, rows: slice) -> Small:
        """See `EncryptedWeight`."""
        return self.held[prime][rows]


def _sealed(keys: LatticeKeys, rows: Rows, part: slice, secrets: list[Array], stream: Stream, tops: Stream) -> tuple[list[Array], Array]:
    """C: digits of what is below a unit of the b of these inner indices, and R's columns, each (inner, count)."""
    ring, form, size = rows.budget, rows.form, part.stop - part.start
    base, shape = Base((), rows.bits), (size, rows.count)
    error = noise.errors(stream, size * rows.count).reshape(shape)
    x = []
    for a, s, p in zip(polynomials(keys.public_seed, part.start, size, ring), secrets, ring.primes, strict=True):
        # (size, blocks, N) to (size, count)
        hidden = field_of(p, ring.degree).backward(times(a, s, p)).reshape(size, -1)[:, : rows.count]
        x.append(reduced(error - hidden, p))
    whole, _ = base.fraction(np.stack(x), ring.primes)
    top = tops.uniform(shape, form.bits).numpy()
    units, cut = base.scale(whole, ring.primes)
    _, cut_top = base.scale(top[None], ring.primes)
    # Q T / 2^bits at S and Q w / 2^bits here are both rounded down: a coin makes their difference right on average, as of any message
    more = np.floor(cut - cut_top)
    coins = stream.raw(4 * more.size).view(np.uint32).reshape(shape) * 2.0**-32
    more = (more + (coins < cut - cut_top - more)).astype(np.int64)
    count = len(rows.digits)
    below = [reduced(v - u - more + rows.margin % p, p) for u, v, p in zip(units[:count], x[:count], ring.primes[:count], strict=True)]
    digits = Base(ring.primes[:count]).digits(np.stack(below))
    return list(digits), top - whole[0]


def _opened(rows: Rows, digits: list[Array], tops: Stream) -> list[Small]:
    """S: the b of some inner indices as residues, (inner, count) for each prime."""
    ring, base = rows.budget, Base((), rows.bits)
    units, _ = base.scale(tops.uniform(digits[0].shape, rows.bits).numpy()[None], ring.primes)
    below, found = Base(ring.primes[: len(digits)]), []
    for unit, p in zip(units, ring.primes, strict=True):
        lifted = reduced(below.lift(np.stack(digits), p, False) - rows.margin % p, p)
        found.append(plus(lifted, unit, p).astype(np.int32))
    return found


def _check(rows: Rows, digits: list[Array]) -> None:
    """TransportError for a digit that is none."""
    for digit, p in zip(digits, rows.budget.primes, strict=False):
        if digit.size and int(digit.max()) >= p:
            raise TransportError("a ciphertext has digits out of range", peer="client", remedy="compare the versions of both parties")


def _begin(rows: Rows, keys: LatticeKeys | None) -> Protocol_[tuple[_Columns | None, Prg | None]]:
    """C's first message: public keys under every secret, seeds of a and of the tops. What S has of R then, and both parties' tops."""
    ring, form = rows.budget, rows.form
    public, seeds = None, (None, None) if keys is None else (keys.public_seed, new_seed())
    if keys is not None:
        secrets = transformed(keys.secrets(form), ring)
        error = noise.errors(noise.fresh(), form.blocks * ring.degree).reshape(form.blocks, ring.degree)
        a = polynomials(keys.public_seed, PUBLIC_KEY, 1, ring)
        hidden = [field_of(p, ring.degree).backward(times(x, s, p)[0]) for x, s, p in zip(a, secrets, ring.primes, strict=True)]
        public = [reduced(error - h, p) for h, p in zip(hidden, ring.primes, strict=True)]
    items = [seed_item(Role.CLIENT, seed) for seed in seeds]
    received = yield [*items, *residue_items(Role.CLIENT, public, (form.blocks, ring.degree), ring.primes)]
    if seeds[1] is not None:
        return None, Prg(derive(seeds[1], "tops of rows"))
    if not known(*received):
        return None, None
    keys_of_c = [row.astype(np.int32) for row in residues_of(received[2:], ring.primes, Role.CLIENT)]
    return _Columns(rows, seed_of(received[0]), keys_of_c), Prg(derive(seed_of(received[1]), "tops of rows"))


def _give(rows: Rows, keys: LatticeKeys | None) -> Protocol_[tuple[_Columns | None, Tensor]]:
    """Step 1: what S has of R's columns then, and R (count, inner) at C; None and a blank where they are not known."""
    ring = rows.budget
    held, tops = yield from _begin(rows, keys)
    secrets = [] if keys is None else transformed(keys.secrets(rows.form), ring)
    r, stream = list[Array](), noise.fresh()
    for number, part in enumerate(rows.inputs()):
        sent: list[Tensor] = [blank(part.stop - part.start, rows.count) for _ in rows.digits]
        if keys is not None and tops is not None:
            digits, column = _sealed(keys, rows, part, secrets, stream, tops.stream(number))
            sent = [torch.from_numpy(digit) for digit in digits]
            r.append(column)
        arrived = yield [Item(value, width, from_server=False) for value, width in zip(sent, rows.digits, strict=True)]
        if held is not None and tops is not None:
            got = [value.numpy() for value in arrived]
            _check(rows, got)
            for row, opened in zip(held.held, _opened(rows, got, tops.stream(number)), strict=True):
                row[part] = opened
    if not r:
        return held, blank(rows.count, rows.inner)
    return None, reduce(torch.from_numpy(np.concatenate(r)), rows.bits).T.contiguous()


def make(role: Role, rows: Rows, weight: Tensor | None, *, traced: bool = False) -> Protocol_[tuple[Tensor, Tensor]]:
    """R (count, inner), a blank at S, and this party's share of -(R W), (count, outer), all modulo 2^bits.

    `weight`: at S W's entries as they are stored, any representatives; None at C. C makes its own keys, which nobody needs afterwards.
    Messages: `_begin`'s and as many as `Rows.inputs` of C's, then as many as `Rows.outputs` of S's. Bytes: `Rows.size`.
    """
    form, sums, scalars = rows.form, None, None
    keys = LatticeKeys() if role is Role.CLIENT and not traced else None
    held, r = yield from _give(rows, keys)
    if held is not None and weight is not None:
        matrix = weight.cpu() if rows.transposed else weight.cpu().T  # (outer, inner)
        scalars = signed(reduce(-matrix, rows.bits), rows.bits).numpy()
    ends = held if role is Role.SERVER else None if keys is None else WeightKeys(keys, rows.name)
    shares = []
    for part in rows.outputs():
        if held is not None and scalars is not None:
            sums = partial(combined, held, scalars[part], noise.fresh())
        shares.append((yield from exchange(ends, form, part.stop - part.start, sums, Role.SERVER)))
    if not known(*shares):
        return r, blank(rows.count, rows.outer)
    return r, torch.cat(shares).T.contiguous()
