"""Shares of products with a server's matrix that the client holds encrypted, and of single rows of it.

Source: Nimbus (arXiv 2411.15707), with an encryption of zero on every answer, without which c1 = sum r_i a_i could be solved for r, and
Gaussians that hide r in the noise (`hiding`). Steps: C sums r_i, or rather r_i plus a Gaussian multiple of 2^bits, times the rows'
ciphertexts, adds an encryption of zero under S's public keys and a Gaussian to each output, rounds, and sends c1
and a few bits of the used coefficients of c0, of which the upper part is a fresh public seed's stream; C's share is what makes that true.
S decrypts. One message C -> S: w bits for each of N coefficients, 3 or 4 for each output. Plaintexts are in Z_2^bits: nothing to convert.
Learns: C ciphertexts (RLWE), S answers that hang on its share alone, within 2^-79 each; rows of a table within 2^-40, 2^20 of them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols import security
from protocols.correlations import Role
from protocols.lattice import gauss, kernels, noise
from protocols.lattice.ciphertext import hide, seed_item, seed_of, zeros
from protocols.lattice.noise import Array
from protocols.lattice.parameters import Budget
from protocols.lattice.rings import Base, plus, primes_below, reduced, times
from protocols.lattice.rings import field as field_of
from protocols.lattice.weights import EncryptedWeight, Form, Small, WeightKeys, polynomials
from protocols.memo import Memo
from protocols.prg import Prg, Stream, new_seed
from protocols.ring import blank, known, pack, reduce, signed
from protocols.rounds import Item, Protocol_

Sums = Callable[[slice], tuple[list[Array], list[Array]]]

TERMS = 256
"""Rows whose products with centred scalars float64 sums exactly: 2^23 2^22 2^8 = 2^53."""
HELD = 1 << 24
"""Elements of a block of sums, about."""
ANSWERED = 1 << 18
"""Elements of a block of answers, about: what a processor's cache holds."""


FEW = 8
"""Rows below which an integer loop is faster than making floats of the matrix."""


def _times(scalars: Array, matrix: Small, total: Array) -> None:
    """total += scalars (n, k) @ matrix (k, c), exactly: scalars centred, below 2^22, k at most TERMS, the matrix below 2^23."""
    if len(scalars) < FEW:
        kernels.combine(scalars.astype(np.int32), matrix, total)
        return
    found = torch.from_numpy(scalars.astype(np.float64)) @ torch.from_numpy(matrix.astype(np.float64))
    total += found.numpy().astype(np.int64)


def _bytes(rows: list[Any]) -> int:
    return sum(row.nbytes for row in rows)


@Memo(256 * 2**20).kept(_bytes)
def _public(seed: bytes, first: int, count: int, ring: Budget) -> list[Any]:
    """`polynomials` that are public, for maps that share them and for the next token; packed: those of two rings are to find room."""
    found = polynomials(seed, first, count, ring)
    return [pack(torch.from_numpy(row), p.bit_length()) for row, p in zip(found, ring.primes, strict=True)]


def _unpacked(data: Any, count: int, ring: Budget, p: int) -> Small:
    out = np.empty((count, ring.degree), np.int32)
    kernels.unpack(data, out.size, p.bit_length(), 0, out.reshape(-1))
    return out


def combined(held: EncryptedWeight, all_scalars: Array, stream: Stream, rows: slice) -> tuple[list[Array], list[Array]]:
    """Sums of scalars (n, inner) times the rows: c1 (n, N) as values, c0 (n, outer) as coefficients, for each prime.

    Of a scalar another representative is taken, at random, anew each time: only so its product hides it (`hiding`).
    """
    scalars = all_scalars[rows]
    form, ring, n = held.form, held.form.budget, len(scalars)
    units = gauss.coset(stream, scalars * 2.0**-form.bits, lambda i: Fraction(int(scalars.reshape(-1)[i]), 1 << form.bits))
    first = [np.zeros((n, ring.degree), np.int64) for _ in ring.primes]
    second = [np.zeros((n, form.outer), np.int64) for _ in ring.primes]
    for start in range(0, form.inner, TERMS):
        part = slice(start, min(form.inner, start + TERMS))
        a = _public(held.seed, start, part.stop - start, ring)
        for i, p in enumerate(ring.primes):
            centred = reduced(reduced(scalars[:, part], p) + units[:, part] * np.int64((1 << form.bits) % p), p)
            centred -= (centred > p // 2) * np.int64(p)
            _times(centred, _unpacked(a[i], part.stop - part.start, ring, p), first[i])
            _times(centred, held.rows(i, part), second[i])
    return [reduced(x, p) for x, p in zip(first, ring.primes, strict=True)], [
        reduced(x, p) for x, p in zip(second, ring.primes, strict=True)
    ]


def _taken(held: EncryptedWeight, all_ids: Array, rows: slice) -> tuple[list[Array], list[Array]]:
    """The rows of these numbers, in the same form."""
    ring = held.form.budget
    ids = all_ids[rows]
    found = [polynomials(held.seed, int(k), 1, ring) for k in ids]
    first = [np.concatenate([each[i] for each in found]) for i in range(len(ring.primes))]
    return first, held.chosen(ids)


def _answer(held: EncryptedWeight, first: list[Array], second: list[Array], stream: Stream, tops: Stream) -> tuple[Array, ...]:
    """Limbs of c1, the upper one first, each (n, N), low bits of c0 (n, outer), and C's shares (n, outer)."""
    form, ring, n = held.form, held.form.budget, len(first[0])
    upper, *rest = form.limbs
    lower = sum(rest)
    error = gauss.narrow(stream, n * ring.degree, security.HINT).reshape(n, ring.degree)
    zero = zeros(held.public_values, n, ring, stream)
    c0, c1 = [], []
    for i, p in enumerate(ring.primes):
        zero[i][:, 0] = plus(zero[i][:, 0].copy(), first[i], p)
        found = field_of(p, ring.degree).backward(zero[i])  # (n, 1 + blocks, N)
        c1.append(reduced(found[:, 0] + error, p))
        c0.append(plus(np.ascontiguousarray(found[:, 1:].reshape(n, -1)[:, : form.outer]), second[i], p))
    (high,), frac = Base((), upper).fraction(np.stack(c1), ring.primes)
    low = (frac * (1 << lower) + 0.5).astype(np.int64)
    limbs = [(high + (low >> lower)) & ((1 << upper) - 1)]
    for width in rest:
        lower -= width
        limbs.append((low >> lower) & ((1 << width) - 1))
    (whole,), kept = hide(c0, ring, Base((), form.bits), stream)
    top = tops.uniform((n, form.outer), form.bits).numpy()
    return *limbs, kept, whole - top


def _decrypt(keys: WeightKeys, form: Form, limbs: list[Array], bits: Array, tops: Stream) -> Array:
    """S's shares (n, outer)."""
    ring, n, spare = form.budget, len(bits), form.spare
    (p,) = primes_below(48, 2 * ring.degree, 1)
    transform = field_of(p, ring.degree)
    secrets = transform.forward(reduced(keys.secrets(form), p))
    whole, shift = np.zeros((n, form.outer), np.int64), sum(form.limbs)
    for limb, width in zip(limbs, form.limbs, strict=True):
        shift -= width
        found = transform.backward(times(transform.forward(limb.copy()), secrets, p)).reshape(n, -1)[:, : form.outer]
        found = np.where(found > p // 2, found - p, found)
        whole += found << (shift - spare) if shift else found >> spare
    below = (found & ((1 << spare) - 1)) * 2.0**-spare
    carry = (below + (bits + 0.5) * 2.0**-ring.low_bits + 0.5).astype(np.int64)
    return np.asarray(whole + carry + tops.uniform((n, form.outer), form.bits).numpy())


def exchange(
    held: EncryptedWeight | WeightKeys | None, form: Form, count: int, sums: Sums | None, sender: Role = Role.CLIENT
) -> Protocol_[Tensor]:
    """The message of who holds ciphertexts, C unless `sender` says otherwise, and what both make of it.

    `sums` gives that party the sums of some of `count` answers, and is None where they are not known.
    """
    ring = form.budget
    shapes = (*((count, ring.degree) for _ in form.limbs), (count, form.outer))
    values: list[Tensor] = [blank(*shape) for shape in shapes]
    seed, share = None, blank(count, form.outer)
    if isinstance(held, EncryptedWeight) and sums is not None:
        seed, stream, found = new_seed(), noise.fresh(), []
        tops, size, most = Prg(seed).stream(0), max(1, HELD // (len(ring.primes) * ring.degree)), max(1, ANSWERED // ring.degree)
        for start in range(0, count, size):
            first, second = sums(slice(start, min(count, start + size)))
            for at in range(0, len(first[0]), most):
                part = slice(at, at + most)
                found.append(_answer(held, [x[part] for x in first], [x[part] for x in second], stream, tops))
        *values, share = (torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True))
    widths = (*form.limbs, ring.low_bits)
    server = sender is Role.SERVER
    messages = (Item(v, w, from_server=server, from_client=not server) for v, w in zip(values, widths, strict=True))
    items = [seed_item(sender, seed), *messages]
    received = yield items
    if isinstance(held, WeightKeys):
        *limbs, rest = (value.numpy() for value in received[1:])
        tops, size, shares = Prg(seed_of(received[0])).stream(0), max(1, ANSWERED // ring.degree), []
        for start in range(0, count, size):
            part = slice(start, start + size)
            shares.append(_decrypt(held, form, [limb[part] for limb in limbs], rest[part], tops))
        share = torch.from_numpy(np.concatenate(shares))
    return reduce(share, form.bits)


def linear(held: EncryptedWeight | WeightKeys | None, form: Form, r: Tensor) -> Protocol_[Tensor]:
    """Shares of -(r W) modulo 2^bits, (n, outer): r (n, inner) at C, any representatives; S passes a blank. See the module's text."""
    sums = None
    if isinstance(held, EncryptedWeight) and known(r):
        sums = partial(combined, held, signed(reduce(-r, form.bits), form.bits).numpy(), noise.fresh())
    return (yield from exchange(held, form, r.shape[0], sums))


def lookup(held: EncryptedWeight | WeightKeys | None, form: Form, ids: Tensor) -> Protocol_[Tensor]:
    """Shares of the rows of these numbers modulo 2^bits, (n, outer): ids (n,) at C, a blank at S."""
    sums = None
    if isinstance(held, EncryptedWeight) and known(ids):
        sums = partial(_taken, held, ids.numpy())
    return (yield from exchange(held, form, ids.shape[0], sums))
