"""Strings of bits, pads and the kernels of products against their twins; what pads have to do with each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from protocols.ot import kernels, words
from protocols.ot.pads import Hash
from protocols.ot.spending import Table
from protocols.ot.words import Aes, Words
from protocols.security import HASH_SPAN
from tests.ot import plain
from tests.ot.test_silent import ONE
from tests.ot.test_silent import words as drawn


@pytest.mark.parametrize("bits", [1, 5, 8, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1000])
def test_strings(bits: int, count: int) -> None:
    values = drawn(count)
    string = words.pack(values, bits)
    assert np.array_equal(string, plain.pack(values, bits))
    back = words.unpack(string, count, bits)
    assert np.array_equal(back, plain.unpack(string, count, bits)) and np.array_equal(back, values & words.mask(bits))


@pytest.mark.parametrize("first", [0, 5, HASH_SPAN - 1, 2**40 + 3])
@pytest.mark.parametrize("wide", [1, 2, 3, 16])
def test_pads(first: int, wide: int) -> None:
    """Both ends' pads are the hash's, whatever the pieces they are made in; keys change with the span."""
    blocks, delta = drawn(300, 2), drawn(2)
    receiver, sender = Hash(b"s", None), Hash(b"s", delta)
    pads = sender.pads([blocks[:100], blocks[100:]], first, wide)
    assert np.array_equal(pads[:, :1], receiver.pads([blocks], first, wide))
    assert np.array_equal(pads[:, 1:], receiver.pads([blocks ^ delta], first, wide))
    for at in (0, 7, 299):
        laid = plain.lay(blocks[at : at + 1], first + at)
        more = np.repeat(laid, -(-wide // 2), 0)
        more[:, 1] ^= np.arange(len(more), dtype=np.uint64)
        key = Hash(b"s", None)._key((first + at) // HASH_SPAN)
        assert np.array_equal((key.blocks(more) ^ more).reshape(-1)[:wide], pads[at, 0])


def test_pads_look_independent() -> None:
    """Of the two choices, of two sessions, of two numbers: words agree in half of their bits; none comes twice."""
    n = 4000
    blocks, delta = drawn(n, 2), drawn(2)
    here = Hash(b"one", delta).pads([blocks], 0)[..., 0]
    others = [here[:, 1], Hash(b"two", delta).pads([blocks], 0)[:, 0, 0], Hash(b"one", delta).pads([blocks], 1)[:, 0, 0], blocks[:, 0]]
    for other in others:
        agree = np.unpackbits((here[:, 0] ^ other).view(np.uint8)).mean()
        assert abs(agree - 0.5) < 5 / (64 * n) ** 0.5  # ten deviations
    assert len(np.unique(np.concatenate([here.reshape(-1), *others[1:3]]))) == 4 * n


@pytest.mark.parametrize("xor", [False, True])
@pytest.mark.parametrize(
    ("n", "y_bits", "bits", "drop"),
    [(1, 1, 1, 0), (7, 3, 64, 0), (130, 5, 5, 0), (64, 40, 41, 0), (1000, 1, 24, 0), (65, 21, 22, 16), (9, 7, 48, 16), (31, 12, 13, 3)],
)
def test_products_from_pads(n: int, y_bits: int, bits: int, drop: int, xor: bool) -> None:
    """The kernels, in pieces of odd sizes, are the twins; both shares come to the products, less their low bits."""
    if xor and (y_bits > 1 or drop):
        return
    count = n * y_bits
    x, y, blocks, delta, aes = drawn(n), drawn(n) & words.mask(y_bits), drawn(count, 2), drawn(2), Aes(bytes(16))
    delta[0] |= ONE
    choice = blocks[:, 0] & ONE
    q = blocks ^ choice[:, None] * delta
    wanted = np.concatenate([y >> np.uint64(i) & ONE for i in range(y_bits)])
    pads = [aes.blocks(laid) ^ laid for laid in (plain.lay(q, 9), plain.lay(q ^ delta, 9))]
    change = (pads[0] ^ pads[1])[:, 0] * (wanted ^ choice)
    near, far = ((pad[:, 0] ^ change).reshape(y_bits, n) for pad in pads)
    string, share = plain.scale_send(near, far, x, bits, xor, drop)

    flips, sent = np.zeros(-(-count // 64), np.uint64), np.zeros(len(string) + 1, np.uint64)
    mine, theirs = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    cuts = sorted({0, count // 3, count // 2 + 1, count} & set(range(count + 1)))
    for at, stop in pairwise(cuts):
        size = stop - at
        laid = np.empty(2 * size, np.uint64)
        kernels.lay_one(blocks[at:stop].reshape(-1), size, 9 + at, laid)
        assert np.array_equal(laid.reshape(-1, 2), plain.lay(blocks[at:stop], 9 + at))
        kernels.scale_choose(laid, aes.blocks(laid), blocks[at:stop].reshape(-1), at, size, y, drop, xor, theirs, flips)
    assert np.array_equal(flips, plain.pack(wanted ^ choice, 1))
    known = (aes.blocks(laid := plain.lay(blocks, 9)) ^ laid)[:, 0].reshape(y_bits, n)
    assert np.array_equal(theirs, plain.scale_choose(known, y, xor, drop))
    for at, stop in pairwise(cuts):
        size = stop - at
        laid = np.empty(4 * size, np.uint64)
        kernels.lay_two(q[at:stop].reshape(-1), size, 9 + at, delta, laid)
        kernels.scale_send(laid, aes.blocks(laid), at, size, flips, x, bits, drop, xor, mine, sent)
    assert np.array_equal(sent[:-1], string) and np.array_equal(mine, share)
    payloads = plain.scale_payloads(near, far, x, xor, drop)
    masked = np.stack([row & words.mask(bits - max(0, i - drop)) for i, row in enumerate(payloads)])
    added = plain.scale_finish(masked, y, xor, drop)
    before = theirs.copy()
    kernels.scale_finish(sent[:-1], y, y_bits, bits, drop, xor, theirs)
    assert np.array_equal(theirs, before ^ added if xor else before + added)
    total = mine ^ theirs if xor else mine + theirs
    exact = [(int(a) % (1 << bits + drop)) * int(b) for a, b in zip(x, y, strict=True)]
    off = [(2 * (int(z) << drop) - 2 * z0) % (2 << bits + drop) for z, z0 in zip(total, exact, strict=True)]
    assert max(min(each, (2 << bits + drop) - each) for each in off) <= min(drop, y_bits) << drop


@pytest.mark.parametrize(("m", "bits"), [(1, 1), (1, 33), (3, 7), (5, 2), (6, 1), (6, 64), (4, 9)])
def test_tables(m: int, bits: int) -> None:
    n, how = 37, Table(37, m, bits)
    pads, flips, table, index = drawn(m * n, 2, how.groups), drawn(m * n) & ONE, drawn(n, 1 << m), drawn(n) & words.mask(m)
    sent = np.zeros(how.words + 1, np.uint64)
    kernels.table_send(pads, plain.pack(flips, 1), table, how.per, bits, np.stack([how.ones(k) for k in range(m)]), sent)
    groups = plain.table_send(pads.reshape(m, n, 2, -1), flips.reshape(m, n), table, how.per, bits)
    assert np.array_equal(sent[:-1], plain.pack(groups.reshape(-1), how.per * bits))
    mine, found = np.ascontiguousarray(pads[:, :1]), np.empty(n, np.uint64)
    kernels.table_choose(mine, sent[:-1], index, how.per, bits, m, found)
    assert np.array_equal(found, plain.table_choose(mine.reshape(m, n, 1, -1), groups, index, how.per, bits))


def test_triples() -> None:
    n, bits, delta = 5, 3, drawn(2)
    delta[0] |= ONE
    blocks = drawn(n * bits, 2)
    q = blocks ^ (blocks[:, :1] & ONE) * delta

    def made(hashed: Hash, of: Words) -> tuple[Words, Words]:
        factor, share = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        for piece in (slice(0, 4), slice(4, None)):
            for at, size, part, laid, aes in hashed.spans([of[piece]], 0, piece.start):
                kernels.triples(laid, aes, part, at, size, hashed.sides == 2, factor, share)
        return factor, share

    (a, r), (b, s) = made(Hash(b"t", delta), q), made(Hash(b"t", None), blocks)
    pads = Hash(b"t", delta).pads([q], 0)[..., 0]
    places = 2 ** np.arange(bits, dtype=np.uint64)
    assert np.array_equal(r ^ s, a & b) and np.array_equal(b, (blocks[:, 0] & ONE).reshape(bits, n).T @ places)
    assert np.array_equal(a, ((pads[:, 0] ^ pads[:, 1]) & ONE).reshape(bits, n).T @ places)
