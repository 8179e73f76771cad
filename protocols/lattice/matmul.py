"""Shares of products of matrices by ciphertexts: many heads at once, exact over the integers, then modulo 2^bits.

Sources: BFV (ePrint 2012/144) in residues (ePrint 2016/510), under several secrets for one `a` (Peikert, Vaikuntanathan, Waters: CRYPTO
2008);
plaintexts that are one scalar for each of several roots, so that no rotation is needed (a layout of this project's; slots: ePrint
2011/133); the
wrap of two shares whose sum's sign is known as one AND of private bits (Cheetah, ePrint 2022/207, section 4).

Steps. The holder, who knows right, encrypts for every inner index l the columns of right[:, l]: a from a seed, b_j = -a s_j + e + Q/P m.
The
other party, who knows left, sums left[h, i, l] times these over l, adds an encryption of zero under the holder's public keys and a flood
(see
`parameters.Budget`), and rounds. Its share is what makes the upper part of c0 equal to a fresh public seed's stream, so that of c0 only a
few bits
below a unit travel. The holder decrypts: its share follows from what it received. Both turn their shares modulo P, of a number in
[0, P/2), to shares modulo 2^bits.
Learns: neither anything. The holder sees answers that are a flood away from fresh encryptions of its share (`security.FLOOD_BITS`), the
other
party ciphertexts and public keys (RLWE). A corrupted holder's share is a function of its view, which an ideal functionality allows: it lets
a corrupted party choose its share, and the other's is uniform given that, since the seed's stream is uniform modulo P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols import security
from protocols.correlations import Role
from protocols.lattice import gauss, kernels, noise
from protocols.lattice.ciphertext import Keys, hide, residue_items, residues_of, seed_item, seed_of, uniform_rows
from protocols.lattice.gilboa import Products
from protocols.lattice.noise import Array
from protocols.lattice.plan import Plan
from protocols.lattice.rings import Base, drop, plus, reduced, times, wrapped
from protocols.lattice.rings import field as field_of
from protocols.prg import Prg, Stream, derive, new_seed
from protocols.ring import blank, known, reduce, signed
from protocols.rounds import Item, Protocol_

HELD = 1 << 20  # elements of a block of answers, about; both parties number blocks alike
STEP_BITS = 32  # of a polynomial's number, below those of its group


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one group's answers."""

    number: int
    group: int
    rows: slice


def _blocks(plan: Plan) -> Iterator[_Block]:
    size = max(1, HELD // (plan.budget.degree * (1 + plan.secrets)))
    number = 0
    for group in range(plan.groups):
        for start in range(0, plan.rows, size):
            yield _Block(number, group, slice(start, min(plan.rows, start + size)))
            number += 1


def _wanted(plan: Plan, need: Tensor | None) -> Any:
    """Which outputs are, (n, S, b)."""
    out = np.zeros((plan.rows, plan.secrets * plan.width), bool)
    out[:, : plan.columns] = True if need is None else need.numpy()
    return out.reshape(plan.rows, plan.secrets, plan.width)


def _units(plan: Plan, x: Array) -> Array:
    """(H, d, ...) to (groups, roots, steps, ...), zeros where there is nothing."""
    out = np.zeros((plan.heads, plan.parts * plan.steps, *x.shape[2:]), np.int64)
    out[:, : plan.inner] = x
    # (H parts, steps, ...)
    out = out.reshape(plan.heads * plan.parts, plan.steps, *x.shape[2:])
    full = np.zeros((plan.groups * plan.roots, *out.shape[1:]), np.int64)
    full[: len(out)] = out
    return full.reshape(plan.groups, plan.roots, *out.shape[1:])


def _encrypt(plan: Plan, secrets: Sequence[list[Array]], right: Array, seed: bytes, stream: Stream, step: int) -> list[Array]:
    """The b of every (group, step, secret), after the transform's stages that part the roots: (groups, steps, S, N) for each prime."""
    ring, base = plan.budget, Base(plan.plain)
    shape = (plan.groups, plan.steps, plan.secrets, ring.degree)
    out = [np.empty(shape, np.int64) for _ in ring.primes]
    padded = np.zeros((*right.shape[:2], plan.secrets * plan.width), np.int64)
    padded[..., : plan.columns] = right
    for group, units in enumerate(_units(plan, padded)):
        # (roots, steps, S, b) to (steps, S, roots b)
        slots = units.reshape(plan.roots, plan.steps, plan.secrets, plan.width).transpose(1, 2, 0, 3).reshape(shape[1:])
        message = base.residues(slots)
        for row, p in zip(message, plan.plain, strict=True):
            field_of(p, plan.roots).backward(row)
        scaled, cut = base.scale(message, ring.primes)
        coins = stream.raw(4 * cut.size).view(np.uint32).reshape(cut.shape) * 2.0**-32
        error = noise.errors(stream, cut.size).reshape(cut.shape) + (coins < cut)
        uniform = uniform_rows(seed, (group << STEP_BITS) + step, plan.steps, ring)
        for i, p in enumerate(ring.primes):
            transform = field_of(p, ring.degree)
            secret = np.stack([key[i] for key in secrets])
            hidden = transform.backward(times(uniform[i], secret, p), plan.roots)
            body = transform.forward(reduced(scaled[i] + error, p), 1, plan.roots)
            out[i][group] = reduced(body - hidden, p)
    return out


def _plaintexts(plan: Plan, base: Base, left: Array, stream: Stream) -> list[Array]:
    """Scalars (roots, steps, n) of one group as values at the roots modulo each prime, (roots, n, steps).

    Of the polynomials' coefficients other representatives modulo P are taken, at random, anew each time (`hiding`).
    """
    slots = np.ascontiguousarray(left.transpose(2, 1, 0))  # (n, steps, roots)
    residues = base.residues(slots)
    for row, p in zip(residues, plan.plain, strict=True):
        field_of(p, plan.roots).backward(row)
    found = base.digits(residues)
    units = gauss.coset(stream, base.ratios(found), lambda i: base.ratio(found.reshape(len(found), -1)[:, i]))
    out = []
    for p in plan.budget.primes:
        lifted = reduced(base.lift(found, p) + units * np.int64(plan.modulus % p), p)
        values = field_of(p, plan.budget.degree).forward(lifted, 1, plan.roots)
        out.append(np.ascontiguousarray(values.transpose(2, 0, 1)))
    return out


@dataclass(slots=True)
class _Answer:
    """What is sent of the answers, and the answering party's share modulo each prime of P."""

    first: list[Array]  # c1, (groups, n, N) for each kept prime
    low: list[Array] = field(default_factory=list)


def _answer(plan: Plan, keys: Keys, left: Array, sealed: Sequence[Array], seeds: tuple[bytes, bytes], wanted: Any) -> tuple[_Answer, Array]:
    ring, base, stream = plan.budget, Base(plan.plain), noise.fresh()
    answer = _Answer([np.empty((plan.groups, plan.rows, ring.degree), np.int64) for _ in ring.kept])
    share = np.zeros((len(plan.plain), plan.heads, plan.rows, plan.columns), np.int64)
    lefts = _units(plan, np.ascontiguousarray(left.transpose(0, 2, 1)))  # (groups, roots, steps, n)
    group, columns = -1, list[Array]()
    for block in _blocks(plan):
        if block.group != group:
            group = block.group
            columns = _columns(plan, sealed, seeds[0], group)
        rows = block.rows.stop - block.rows.start
        scalars = _plaintexts(plan, base, lefts[group][..., block.rows], stream)
        zeros = keys.zeros(rows, plan.secrets, stream)
        last = gauss.narrow(stream, rows * ring.degree, security.HINT).reshape(rows, ring.degree)
        first, second = [], []
        for i, p in enumerate(ring.primes):
            transform = field_of(p, ring.degree)
            out = np.empty((plan.roots, rows, (1 + plan.secrets) * plan.width), np.int64)
            kernels.products(scalars[i], columns[i], p, out)
            # (roots, rows, 1 + S, b) to (rows, 1 + S, N)
            sums = (
                out.reshape(plan.roots, rows, 1 + plan.secrets, plan.width)
                .transpose(1, 2, 0, 3)
                .reshape(rows, 1 + plan.secrets, ring.degree)
            )
            found = transform.backward(plus(transform.backward(zeros[i], plan.roots), sums, p), 1, plan.roots)
            first.append(reduced(found[:, 0] + last, p))
            second.append(np.ascontiguousarray(found[:, 1:]))
        for kept, row in zip(answer.first, drop(first, ring.primes, ring.keep), strict=True):
            kept[group, block.rows] = row
        # what nobody wants is not hidden, and goes nowhere
        whole, low = hide([_select(x, plan, wanted[block.rows]) for x in second], ring, base, stream)
        tops = _tops(plan, seeds[1], block)
        answer.low.append(low.astype(np.uint8))
        spread = (_spread(row, plan, wanted[block.rows]) for row in whole)
        _add(plan, share, block, [reduced(w - t, p) for w, t, p in zip(spread, tops, plan.plain, strict=True)])
    return answer, share


def _columns(plan: Plan, sealed: Sequence[Array], seed: bytes, group: int) -> list[Array]:
    """One group's ciphertexts as right operands at every root: (roots, steps, (1 + S) b) for each prime."""
    ring = plan.budget
    uniform = uniform_rows(seed, group << STEP_BITS, plan.steps, ring)
    out = []
    for a, b, p in zip(uniform, sealed, ring.primes, strict=True):
        both = np.concatenate([field_of(p, ring.degree).backward(a, plan.roots)[:, None], b[group]], 1)
        # (steps, 1 + S, roots, b) to (roots, steps, (1 + S) b)
        both = both.reshape(plan.steps, 1 + plan.secrets, plan.roots, plan.width).transpose(2, 0, 1, 3)
        out.append(np.ascontiguousarray(both).reshape(plan.roots, plan.steps, -1))
    return out


def _tops(plan: Plan, seed: bytes, block: _Block) -> list[Array]:
    """The public stream that stands for the upper part of a block's c0, (rows, S, N) modulo each prime of P."""
    stream = Prg(seed).stream(block.number)
    shape = (block.rows.stop - block.rows.start, plan.secrets, plan.budget.degree)
    return [noise.uniform(stream, int(np.prod(shape)), p).reshape(shape) for p in plan.plain]


def _select(x: Array, plan: Plan, wanted: Any) -> Array:
    """Of (rows, S, N) what the wanted columns' coefficients are, flat: for each wanted column its `roots` coefficients."""
    return np.ascontiguousarray(x.reshape(*x.shape[:2], plan.roots, plan.width).transpose(0, 1, 3, 2)[wanted]).reshape(-1)


def _spread(low: Array, plan: Plan, wanted: Any) -> Array:
    """The inverse, zeros elsewhere."""
    out = np.zeros((*wanted.shape, plan.roots), np.int64)
    out[wanted] = low.reshape(-1, plan.roots)
    # (rows, S, b, roots) to (rows, S, N)
    return out.transpose(0, 1, 3, 2).reshape(*wanted.shape[:2], plan.budget.degree)


def _add(plan: Plan, share: Array, block: _Block, coefficients: Sequence[Array]) -> None:
    """Adds the units' values of a block, coefficients (rows, S, N) modulo each prime of P, to the heads' sums."""
    start = block.group * plan.roots
    heads = np.arange(start, min(start + plan.roots, plan.heads * plan.parts)) // plan.parts
    starts = np.flatnonzero(np.diff(heads, prepend=-1))
    for total, row, p in zip(share, coefficients, plan.plain, strict=True):
        values = field_of(p, plan.roots).forward(row, 1, plan.roots).reshape(*row.shape[:2], plan.roots, plan.width)
        # (rows, S, roots, b) to (roots, rows, S b)
        values = values.transpose(2, 0, 1, 3).reshape(plan.roots, row.shape[0], -1)[: len(heads), :, : plan.columns]
        total[heads[0] : heads[-1] + 1, block.rows] += np.add.reduceat(values, starts, axis=0)


def _decrypt(plan: Plan, keys: Keys, first: Sequence[Array], low: Array, seed: bytes, wanted: Any) -> Array:
    """The holder's share modulo each prime of P."""
    ring, base, at = plan.budget, Base(plan.plain), 0
    share = np.zeros((len(plan.plain), plan.heads, plan.rows, plan.columns), np.int64)
    for block in _blocks(plan):
        products = []
        for i, p in enumerate(ring.kept):
            transform = field_of(p, ring.degree)
            values = transform.forward(np.ascontiguousarray(first[i][block.group, block.rows]))
            secret = np.stack([key[i] for key in keys.secrets[: plan.secrets]])
            products.append(transform.backward(times(values, secret, p)))
        whole, below = base.fraction(np.stack(products), ring.kept)
        count = int(wanted[block.rows].sum()) * plan.roots
        lows = _spread(low[at : at + count], plan, wanted[block.rows])
        at += count
        carry = (below + (lows + 0.5) * 2.0**-ring.low_bits + 0.5).astype(np.int64)
        tops = _tops(plan, seed, block)
        _add(plan, share, block, [reduced(w + t + carry, p) for w, t, p in zip(whole, tops, plan.plain, strict=True)])
    return share


def _converted(transfers: Products, role: Role, holder: Role, plan: Plan, found: list[Array] | None, wanted: Any) -> Protocol_[Tensor]:
    """Shares modulo P of z in [-shift, P/2 - shift) to shares modulo 2^bits, for the wanted outputs; exact.

    z_S + z_C exceeds P exactly where either is at least P/2, since z does not reach it: one product of private bits each. `found` has this
    party's share alone, and is emptied.
    """
    shape, bits = (plan.heads, plan.rows, plan.columns), plan.bits
    mask = wanted.reshape(plan.rows, -1)[:, : plan.columns]
    count, holds = plan.heads * int(mask.sum()), role is holder
    other = Role.CLIENT if holder is Role.SERVER else Role.SERVER
    if found is None:
        yield from transfers.correlated(other, blank(count), blank(count), bits)
        return blank(*shape)
    # nothing else of it is held while the transfers are waited for: others' answers are there too
    value, large = _halves(plan, found.pop()[:, :, mask].reshape(len(plan.plain), count), 0 if holds else plan.shift)
    both = yield from transfers.correlated(other, large if holds else blank(count), blank(count) if holds else large, bits)
    value += both * wrapped(plan.modulus)
    out = torch.zeros(shape, dtype=torch.int64)
    out[:, torch.from_numpy(mask)] = reduce(value, bits).reshape(plan.heads, -1)
    return out


def _halves(plan: Plan, share: Array, shift: int) -> tuple[Tensor, Tensor]:
    """Of shares (primes, n) of z the integers modulo 2^64, less P where they are at least its half; and where that is, as 0 or 1."""
    base = Base(plan.plain)
    found = base.digits(np.stack([reduced(row + shift % p, p) for row, p in zip(share, plan.plain, strict=True)]))
    large = torch.from_numpy((found[-1] >= plan.half).astype(np.int64))
    value = torch.from_numpy(base.wrapped(found))
    value -= large * wrapped(plan.modulus)
    value -= wrapped(shift)
    return value, large


def _entries(x: Tensor, bits: int) -> Array:
    return signed(reduce(x, bits), bits).numpy()


@dataclass(slots=True, eq=False, repr=False)
class Chunk:
    """Ciphertexts, answered once or, if they stay, more often: a seed, and at the party that answers b (groups, steps, S, N) a prime."""

    plan: Plan
    seed: bytes = b""
    sealed: list[Array] = field(default_factory=list)
    stays: bool = True

    def used(self) -> None:
        """It was answered: it goes, unless it is to be answered again."""
        if not self.stays:
            self.sealed = []

    def add(self, rows: list[Array], axis: int) -> None:
        """More steps (axis 1) or secrets (axis 2)."""
        self.sealed = [np.concatenate(pair, axis) for pair in zip(self.sealed, rows, strict=True)] if self.sealed else rows


def seal(role: Role, holder: Role, keys: Keys, chunk: Chunk, part: Plan, right: Tensor, secret: int = 0, step: int = 0) -> Protocol_[None]:
    """The holder's message: ciphertexts of right (H, d, m), laid out by `part`, and keys that are missing; the chunk then has them.

    They begin at this secret or at this step of the chunk: one `a` never meets one secret twice.
    """
    ring, fresh = part.budget, keys.missing(secret + part.secrets)
    received = yield _sealing(holder, keys, chunk, part, right, secret, step, fresh)  # and not held here as well while it waits
    many = len(ring.primes)
    if role is not holder and known(*received):
        if fresh:
            keys.receive(seed_of(received[many + 1]), residues_of(received[many + 2 :], ring.primes, holder))
        chunk.seed = seed_of(received[0])
        chunk.add(residues_of(received[1 : many + 1], ring.primes, holder), 1 if step else 2)


def _sealing(holder: Role, keys: Keys, chunk: Chunk, part: Plan, right: Tensor, secret: int, step: int, fresh: int) -> list[Item]:
    ring, public, sealed, seed = part.budget, None, None, None
    if known(right):
        stream = noise.fresh()
        seed = chunk.seed = chunk.seed or new_seed()
        public = keys.make(fresh, stream) if fresh else None
        secrets = keys.secrets[secret : secret + part.secrets]
        sealed = _encrypt(part, secrets, _entries(right, part.bits), derive(seed, "ciphertexts"), stream, step)
    shape = (part.groups, part.steps, part.secrets, ring.degree)
    items = [seed_item(holder, seed), *residue_items(holder, sealed, shape, ring.primes)]
    if fresh:
        items += [seed_item(holder, keys.seed if public else None), *residue_items(holder, public, (fresh, ring.degree), ring.primes)]
    return items


def _shares(role: Role, holder: Role, keys: Keys, chunk: Chunk, left: Tensor, wanted: Any) -> Protocol_[Array | None]:
    """The other party's message, its answers, and this party's share modulo each prime of P; None where it is not known."""
    share, items = _answers(role, holder, keys, chunk, left, wanted)
    message = [items]
    del items
    received = yield message.pop()  # not held here as well while it waits
    if role is holder and known(*received):
        first = residues_of(received[1:-1], chunk.plan.budget.kept, Role.CLIENT if holder is Role.SERVER else Role.SERVER)
        share = _decrypt(chunk.plan, keys, first, received[-1].numpy(), derive(seed_of(received[0]), "tops"), wanted)
    return share


def _answers(role: Role, holder: Role, keys: Keys, chunk: Chunk, left: Tensor, wanted: Any) -> tuple[Array | None, list[Item]]:
    plan, ring = chunk.plan, chunk.plan.budget
    other = Role.CLIENT if holder is Role.SERVER else Role.SERVER
    sent, seed, share = _Answer([]), None, None
    if known(left) and role is other:
        seed = new_seed()
        seeds = (derive(chunk.seed, "ciphertexts"), derive(seed, "tops"))
        sent, share = _answer(plan, keys, _entries(left, plan.bits), chunk.sealed, seeds, wanted)
        chunk.used()
    count = int(wanted.sum()) * plan.groups * plan.roots
    low = torch.from_numpy(np.concatenate(sent.low)) if sent.low else blank(count)
    server = other is Role.SERVER
    return share, [
        seed_item(other, seed),
        *residue_items(other, sent.first or None, (plan.groups, plan.rows, ring.degree), ring.kept),
        Item(low, ring.low_bits, from_server=server, from_client=not server),
    ]


def answer(transfers: Products, role: Role, holder: Role, keys: Keys, chunk: Chunk, left: Tensor, need: Tensor | None) -> Protocol_[Tensor]:
    """Shares of left (H, n, d) times what the chunk holds, (H, n, m) modulo 2^bits; left is a blank at the holder."""
    wanted = _wanted(chunk.plan, need)
    share = yield from _shares(role, holder, keys, chunk, left, wanted)
    found = None if share is None else [share]
    del share
    return (yield from _converted(transfers, role, holder, chunk.plan, found, wanted))


def matmul(
    transfers: Products, role: Role, holder: Role, keys: Keys, plan: Plan, left: Tensor, right: Tensor, need: Tensor | None
) -> Protocol_[Tensor]:
    """Shares of left (H, n, d) @ right (H, d, m) modulo 2^bits by this plan. `need` (n, m): which outputs are wanted.

    Rounds: two messages, and those of one product of private bits an output. Bytes: `Plan.sent`, keys the first time, that product's.
    """
    chunk = Chunk(plan, stays=False)
    yield from seal(role, holder, keys, chunk, plan, right)
    return (yield from answer(transfers, role, holder, keys, chunk, left, need))
