"""What `transfers` does with one part of bounded size: the messages of one direction, and what comes of its pool's pads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from protocols.ot import kernels
from protocols.ot.pool import Pool, carrying
from protocols.ot.words import Words, mask, pack, string_words, words_of
from protocols.rounds import Protocol_
from protocols.security import PART

_ONE = np.uint64(1)


def parts(n: int, each: int) -> Iterator[tuple[int, int]]:
    """Cuts n elements of `each` transfers into parts of at most about `PART` transfers; none for none."""
    step = max(64, PART // each)
    for start in range(0, n, step):
        yield start, min(n, start + step)


class Scaling(NamedTuple):
    """n products x y / 2^drop modulo 2^bits, with y of `y_bits` bits; or, for one bit, their XOR shares."""

    n: int
    bits: int
    y_bits: int
    xor: bool
    drop: int = 0

    @property
    def words(self) -> int:
        """Of the payloads' string."""
        exact = max(0, self.y_bits - self.drop)
        return -(-self.n * (self.y_bits * self.bits - exact * (exact - 1) // 2) // 64)


def scale(pool: Pool, other: Pool, how: Scaling, mine: Words, share: Words) -> Protocol_[None]:
    """Adds this party's share to `share`; `mine` is x at the sender, y at the receiver. Transfers go by y's bits, then by elements.

    `other` is the pool of the other direction.
    """
    count, hashed = how.n * how.y_bits, pool.hash
    flips = np.zeros(string_words(count, 1), np.uint64)
    if hashed is None:
        yield from pool.take(count, lambda first, at, blocks: False)
        yield from carrying([pool.item(pool.receiver, None, len(flips))], other)
        yield from carrying([pool.item(pool.sender, None, how.words)], pool)
    elif pool.sends:
        held: list[tuple[int, int, Words]] = []

        def hold(first: int, at: int, blocks: Words) -> bool:
            held.append((first, at, blocks))
            return True

        yield from pool.take(count, hold)
        (answer,) = yield from carrying([pool.item(pool.receiver, None, len(flips))], other)
        message = np.zeros(how.words + 1, np.uint64)  # the kernel reads one word further
        flips = words_of(answer)
        for first, start, blocks in held:
            for at, size, _, laid, aes in hashed.spans([blocks], first, start):
                kernels.scale_send(laid, aes, at, size, flips, mine, how.bits, how.drop, how.xor, share, message)
            pool.give_back(blocks)
        held.clear()
        yield from carrying([pool.item(pool.sender, message[:-1], how.words)], pool)
    else:

        def choose(first: int, at: int, blocks: Words) -> bool:
            for place, size, part, laid, aes in hashed.spans([blocks], first, at):
                kernels.scale_choose(laid, aes, part, place, size, mine, how.drop, how.xor, share, flips)
            return False

        yield from pool.take(count, choose)
        yield from carrying([pool.item(pool.receiver, flips, len(flips))], other)
        (answer,) = yield from carrying([pool.item(pool.sender, None, how.words)], pool)
        kernels.scale_finish(words_of(answer), mine, how.y_bits, how.bits, how.drop, how.xor, share)


class Table(NamedTuple):
    """n look-ups of one of 2^choice_bits words of `bits` bits; slots of a word's table lie side by side in groups of at most 64 bits."""

    n: int
    choice_bits: int
    bits: int

    @property
    def per(self) -> int:
        """Slots of a group, a power of two."""
        return min(1 << self.choice_bits, 1 << (64 // self.bits).bit_length() - 1)

    @property
    def groups(self) -> int:
        """Of a table."""
        return (1 << self.choice_bits) // self.per

    @property
    def words(self) -> int:
        """Of the tables' string."""
        return string_words(self.n * self.groups, self.per * self.bits)

    def ones(self, k: int) -> Words:
        """Ones where the slots are whose number has the bit k, (groups,)."""
        full = int(mask(self.bits))
        rows = [[(g * self.per + s) >> k & 1 for s in range(self.per)] for g in range(self.groups)]
        return np.array([sum(full << s * self.bits for s, bit in enumerate(row) if bit) for row in rows], np.uint64)


def look_up(pool: Pool, other: Pool, how: Table, index: Words | None, table: Words | None) -> Protocol_[Words]:
    """The receiver's words (n,), for its index (n,) below 2^m and the sender's table (n, 2^m). Transfers go by the index's bits."""
    n, m = how.n, how.choice_bits
    pads = np.empty((0 if pool.hash is None else n * m, 2 if pool.sends else 1, how.groups), np.uint64)
    flips = np.empty(0 if index is None else n * m, np.uint64)

    def keep(first: int, at: int, blocks: Words) -> bool:
        if pool.hash is not None:
            pads[at : at + len(blocks)] = pool.hash.pads([blocks], first + at, how.groups)
        if not pool.sends:
            flips[at : at + len(blocks)] = blocks[:, 0] & _ONE
        return False

    yield from pool.take(n * m, keep)
    if index is not None:
        for k in range(m):
            flips[k * n : (k + 1) * n] ^= index >> np.uint64(k) & _ONE
    (answer,) = yield from carrying([pool.item(pool.receiver, None if index is None else pack(flips, 1), string_words(n * m, 1))], other)
    message = None
    if table is not None:
        message = np.zeros(how.words + 1, np.uint64)
        ones = np.stack([how.ones(k) for k in range(m)])
        kernels.table_send(pads, words_of(answer), np.ascontiguousarray(table), how.per, how.bits, ones, message)
        message = message[:-1]
    (answer,) = yield from carrying([pool.item(pool.sender, message, how.words)], pool)
    if index is None:
        return flips
    found = np.empty(n, np.uint64)
    kernels.table_choose(pads, words_of(answer), index, how.per, how.bits, m, found)
    return found


class Triples:
    """One direction's part in n words of AND triples of `bits` bits: this party's factor there, and its share of the product of both."""

    def __init__(self, pool: Pool, n: int, bits: int) -> None:
        self.pool, self._n, self._bits = pool, n, bits
        size = 0 if pool.hash is None else n
        self.factor, self.share = np.zeros(size, np.uint64), np.zeros(size, np.uint64)

    def __repr__(self) -> str:
        return f"Triples(n={self._n}, bits={self._bits}, values hidden)"

    def take(self) -> Protocol_[None]:
        """Transfers go by bits, then by words."""
        yield from self.pool.take(self._n * self._bits, self._keep)

    def _keep(self, first: int, at: int, blocks: Words) -> bool:
        assert self.pool.hash is not None
        for place, size, part, laid, aes in self.pool.hash.spans([blocks], first, at):
            kernels.triples(laid, aes, part, place, size, self.pool.sends, self.factor, self.share)
        return False
