"""A server's matrix, encrypted once: what of it is public, its keys at S, its ciphertexts at C.

Source: Nimbus (arXiv 2411.15707), whose server encrypts its weights row by row by coefficients. A row's ciphertext is a_i, from a public
seed, and b_i = -a_i s + e + Q/2^bits W_i, of which the used coefficients alone travel; further columns than a polynomial has stand under
further secrets, all maps' rows i under one a_i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Kind
from protocols.errors import ConfigError, TransportError
from protocols.lattice import kernels, noise
from protocols.lattice.ciphertext import transformed, uniform_rows
from protocols.lattice.noise import Array
from protocols.lattice.parameters import Budget, weight_budget
from protocols.lattice.rings import Base, reduced, times
from protocols.lattice.rings import field as field_of
from protocols.linear import LinearMask, Weight
from protocols.prg import SEED_BYTES, Prg, derive, new_seed
from protocols.ring import pack, packed_size, reduce

Small = np.ndarray[Any, np.dtype[np.int32]]

PART = 1 << 22
"""Bytes of a part of what travels, about, and at least one row."""
MOST_ROWS = 128
"""Of a part: each is a whole polynomial while it is made."""
LIMB = 34
"""Bits of one limb of c1, at most: one prime holds its products with s."""
PUBLIC_KEY = 1 << 40
"""The name of the public key's polynomial in the seed's streams; rows are named by their number."""


@dataclass(frozen=True)
class Form:
    """What is public of an encrypted matrix of Z_2^bits: a weight (inner, outer), or `transposed` one that is stored (outer, inner).

    `chosen`: rows are taken one by one, not multiplied by scalars. A weight has as many forms as it has uses.
    """

    name: str
    inner: int  # rows, a ciphertext each
    outer: int  # columns
    bits: int
    transposed: bool = False
    chosen: bool = False

    @staticmethod
    def of(weight: Weight, transposed: bool = False, chosen: bool = False, bits: int = 0) -> Form:
        """A weight in its own ring, or in one of fewer bits."""
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        return Form(weight.name, rows, columns, bits or weight.bits, transposed, chosen)

    @cached_property
    def budget(self) -> Budget:
        """The ring; ConfigError where there is none."""
        found = weight_budget(self.bits, self.inner, self.outer, self.chosen)
        if found is None:
            raise ConfigError(f"no ring of the standard holds {self.name} in {self.bits} bits", remedy="lower it with fewer bits")
        return found

    @property
    def blocks(self) -> int:
        """Polynomials of a row, each under a secret of its own."""
        return -(-self.outer // self.budget.degree)

    @property
    def spare(self) -> int:
        """Bits that c1 has more than the ring."""
        return self.budget.coarse.bit_length() - 1 - self.bits

    @property
    def limbs(self) -> tuple[int, ...]:
        """Bits of c1's limbs, the upper one first: two, or where they would be too wide three; the last has the spare bits."""
        total = self.bits + self.spare
        if total <= 2 * LIMB:
            low = max(self.spare, total // 2)
            return total - low, low
        rest = total - LIMB  # few enough that the fraction they come from, a float64, has them exactly
        return LIMB, rest - rest // 2, rest // 2

    @property
    def rows_of_part(self) -> int:
        """Rows that travel together."""
        return max(1, min(self.inner, MOST_ROWS, PART // max(1, self.row_bytes(1))))

    def row_bytes(self, rows: int) -> int:
        """Of a part of so many rows."""
        return sum(packed_size(rows * self.outer, p.bit_length()) for p in self.budget.primes)

    @property
    def key_bytes(self) -> int:
        """Of the first part: the seed and the public keys."""
        return SEED_BYTES + sum(packed_size(self.blocks * self.budget.degree, p.bit_length()) for p in self.budget.primes)

    @property
    def size(self) -> int:
        """Bytes of all parts, however many they are."""
        whole, rest = divmod(self.inner, self.rows_of_part)
        return self.key_bytes + whole * self.row_bytes(self.rows_of_part) + (self.row_bytes(rest) if rest else 0)

    def part_sizes(self) -> Iterator[int]:
        """Bytes of every part, in order."""
        yield self.key_bytes
        for start in range(0, self.inner, self.rows_of_part):
            yield self.row_bytes(min(self.rows_of_part, self.inner - start))


def forms(kinds: Iterable[Kind]) -> list[Form]:
    """The forms that products of these kinds ask for, each once, in order: what set-up sends."""
    found = dict.fromkeys(
        Form(kind.weight, kind.shape[-1], kind.out, kind.bits, bool(kind.transposed))
        for kind in kinds
        if isinstance(kind, LinearMask) and not kind.diagonal
    )
    return list(found)


def polynomials(seed: bytes, first: int, count: int, ring: Budget) -> list[Array]:
    """The public a of rows, or of `PUBLIC_KEY`, (count, N) for each prime, as values of the whole transform."""
    return uniform_rows(derive(seed, f"a {ring.degree} {ring.primes}"), first, count, ring)


class LatticeKeys:
    """S's keys of all its encrypted weights, from one seed, which S keeps as it keeps its weights. They belong to one lowering:

    under the same keys the ciphertexts of two other matrices of one name and shape would show their difference.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        self._seed = new_seed() if seed is None else seed
        if len(self._seed) != SEED_BYTES:
            raise ConfigError("keys of encrypted weights have another size", remedy="make the set-up anew")

    def __repr__(self) -> str:
        return "LatticeKeys(hidden)"

    def to_bytes(self) -> bytes:
        """What S keeps, for its own eyes."""
        return self._seed

    @staticmethod
    def from_bytes(data: bytes) -> LatticeKeys:
        """The inverse; ConfigError for another size."""
        return LatticeKeys(bytes(data))

    @property
    def public_seed(self) -> bytes:
        """Of all a."""
        return derive(self._seed, "public polynomials")

    def stream(self, form: Form, purpose: str) -> Prg:
        """Randomness for one purpose of one matrix."""
        return Prg(derive(self._seed, f"{purpose} {form} {form.budget.degree} {form.budget.primes}"))

    def secrets(self, form: Form) -> Array:
        """(blocks, N), in -1, 0, 1."""
        prg, degree = self.stream(form, "secret"), form.budget.degree
        return np.stack([noise.secret(prg.stream(k), degree) for k in range(form.blocks)])


class WeightKeys:
    """S's side of one encrypted weight, whatever its forms."""

    def __init__(self, keys: LatticeKeys, name: str) -> None:
        self._keys, self.name = keys, name
        self._secrets: dict[Form, Array] = {}

    def secrets(self, form: Form) -> Array:
        """See `LatticeKeys.secrets`."""
        assert form.name == self.name
        if form not in self._secrets:
            self._secrets[form] = self._keys.secrets(form)
        return self._secrets[form]


def _packed(rows: list[Array], budget: Budget) -> bytes:
    return b"".join(
        pack(torch.from_numpy(np.ascontiguousarray(x)), p.bit_length()).tobytes() for x, p in zip(rows, budget.primes, strict=True)
    )


def encrypt_weight(keys: LatticeKeys, form: Form, encoded: Tensor) -> Iterator[bytes]:
    """S: the parts that C keeps, of `Form.part_sizes`, the same bytes each time; `encoded` has the weight's shape."""
    ring, base, blocks = form.budget, Base((), form.bits), form.blocks
    matrix = reduce((encoded.T if form.transposed else encoded).to(torch.int64), form.bits).cpu().numpy()
    assert matrix.shape == (form.inner, form.outer), f"{form.name}: encryption must cover its tensor once"
    secrets = transformed(keys.secrets(form), ring)  # (blocks, N) for each prime
    a = polynomials(keys.public_seed, PUBLIC_KEY, 1, ring)
    error = noise.errors(keys.stream(form, "error of the public key").stream(0), blocks * ring.degree).reshape(blocks, ring.degree)
    hidden = [field_of(p, ring.degree).backward(times(x, s, p)[0]) for x, s, p in zip(a, secrets, ring.primes, strict=True)]
    yield keys.public_seed + _packed([reduced(error - h, p) for h, p in zip(hidden, ring.primes, strict=True)], ring)
    errors = keys.stream(form, "errors")
    for start in range(0, form.inner, form.rows_of_part):
        rows = min(form.rows_of_part, form.inner - start)
        stream = errors.stream(start)
        scaled, cut = base.scale(matrix[None, start : start + rows], ring.primes)
        coins = stream.raw(4 * cut.size).view(np.uint32).reshape(cut.shape) * 2.0**-32
        small = noise.errors(stream, cut.size).reshape(cut.shape) + (coins < cut)
        a = polynomials(keys.public_seed, start, rows, ring)
        out = []
        for x, s, m, p in zip(a, secrets, scaled, ring.primes, strict=True):
            # (rows, blocks, N) to (rows, outer)
            hidden_row = field_of(p, ring.degree).backward(times(x, s, p)).reshape(rows, -1)[:, : form.outer]
            out.append(reduced(m + small - hidden_row, p))
        yield _packed(out, ring)


class Stored(Protocol):
    """Where the bytes of an encrypted weight lie at C, on a disk or in memory; what is read is gone when it was used."""

    def read(self, at: int, size: int) -> memoryview:
        """So many bytes from there on."""


class InMemory:
    """See `Stored`: in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def read(self, at: int, size: int) -> memoryview:
        """See `Stored`."""
        return memoryview(self.data)[at : at + size]


def _residues(data: memoryview, count: int, budget: Budget, name: str) -> Iterator[Small]:
    """(count,) for each prime, checked, one after the other."""
    at = 0
    for p in budget.primes:
        size = packed_size(count, p.bit_length())
        found = np.empty(count, np.int32)
        kernels.unpack(np.frombuffer(data[at : at + size], np.uint8), count, p.bit_length(), 0, found)
        if found.size and int(found.max()) >= p:
            raise TransportError(f"the encrypted weight {name} has residues out of range", remedy="have the set-up made anew")
        yield found
        at += size


@dataclass(repr=False, eq=False)
class EncryptedWeight:
    """C's side: public keys (blocks, N) for each prime, and where the packed rows (inner, outer) lie, of which none stays in memory."""

    form: Form
    seed: bytes
    public: list[Small]
    stored: Stored

    @cached_property
    def public_values(self) -> list[Array]:
        """The public keys' a and b_j, (1 + blocks, N) for each prime, as values of the whole transform."""
        ring = self.form.budget
        a = polynomials(self.seed, PUBLIC_KEY, 1, ring)
        keys = [field_of(p, ring.degree).forward(x.astype(np.int64)) for x, p in zip(self.public, ring.primes, strict=True)]
        return [np.concatenate([each, key]) for each, key in zip(a, keys, strict=True)]

    def rows(self, prime: int, rows: slice) -> Small:
        """Rows modulo one of the primes, by its place, (rows, outer)."""
        form, start = self.form, rows.start
        out = np.empty((rows.stop - start, form.outer), np.int32)
        while start < rows.stop:
            first, count = self._part(start)
            stop = min(rows.stop, first + count)
            found = out[start - rows.start : stop - rows.start]
            kernels.unpack(*self._section(first, count, prime), (start - first) * form.outer, found.reshape(-1))
            start = stop
        return out

    def chosen(self, ids: Array) -> list[Array]:
        """Rows of these numbers, (ids, outer) for each prime; as much is read for each, whichever it is and whatever was read before."""
        form = self.form
        out = [np.empty((len(ids), form.outer), np.int32) for _ in form.budget.primes]
        for place, row in enumerate(ids.tolist()):
            first, count = self._part(row)
            for prime, found in enumerate(out):
                kernels.unpack(*self._section(first, count, prime), (row - first) * form.outer, found[place])
        return [found.astype(np.int64) for found in out]

    def _part(self, row: int) -> tuple[int, int]:
        """The first of the rows that it travelled with, and how many they are."""
        size = self.form.rows_of_part
        first = row // size * size
        return first, min(size, self.form.inner - first)

    def _section(self, first: int, rows: int, prime: int) -> tuple[Any, int, int]:
        """A part's residues modulo one prime, packed, how many they are, and of how many bits."""
        form, count = self.form, rows * self.form.outer
        sizes = [packed_size(count, p.bit_length()) for p in form.budget.primes[: prime + 1]]
        at = form.key_bytes + first // form.rows_of_part * form.row_bytes(form.rows_of_part) + sum(sizes[:-1])
        return np.frombuffer(self.stored.read(at, sizes[-1]), np.uint8), count, form.budget.primes[prime].bit_length()

    @staticmethod
    def read(form: Form, parts: Iterable[bytes | memoryview], stored: Stored | None = None) -> EncryptedWeight:
        """From the parts, in order, and where they are kept one after the other: without that, in memory.

        TransportError for a part of another size than the form says, or residues out of range.
        """
        ring, found, joined = form.budget, iter(parts), InMemory()
        sizes = form.part_sizes()

        def next_part() -> memoryview:
            part, size = memoryview(next(found, b"")), next(sizes)
            if part.nbytes != size:
                text = f"a part of the encrypted weight {form.name} has {part.nbytes} bytes in place of {size}"
                raise TransportError(text, remedy="have the set-up made anew")
            if stored is None:
                joined.data += part
            return part

        first = bytes(next_part())
        keys = _residues(memoryview(first)[SEED_BYTES:], form.blocks * ring.degree, ring, form.name)
        public = [key.reshape(form.blocks, ring.degree) for key in keys]
        for start in range(0, form.inner, form.rows_of_part):
            for _ in _residues(next_part(), min(form.inner - start, form.rows_of_part) * form.outer, ring, form.name):
                pass  # checked
        if next(found, None) is not None:
            raise TransportError(f"the encrypted weight {form.name} has a part too many", remedy="have the set-up made anew")
        return EncryptedWeight(form, first[:SEED_BYTES], public, stored or joined)
