"""What of transfers is too slow in NumPy, compiled: `tests/ot/plain.py` has the twins. A block of 128 bits is two words, the lower first.

A batch of B trees of n = 2^h leaves lies tree by tree in `nodes`, flat; a level of m nodes is the first m blocks of each tree's, and
the children of node j are j and j + m.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.compiled import compiled

Words = NDArray[np.uint64]

ZERO, ONE = np.uint64(0), np.uint64(1)
EVEN = np.uint64(2**64 - 2)


@compiled
def transpose(rows: Words, out: Words) -> None:
    """Rows of bits (128, w) to blocks, flat (128 w); squares of 64 bits at a time (Hacker's Delight, 7-3)."""
    x = np.empty(64, np.uint64)
    for c in range(rows.shape[1]):
        for h in range(2):
            for i in range(64):
                x[i] = rows[64 * h + 63 - i, c]
            j, ones = 32, np.uint64(0xFFFFFFFF)
            while j:
                k, s = 0, np.uint64(j)
                while k < 64:
                    t = (x[k] ^ (x[k + j] >> s)) & ones
                    x[k] ^= t
                    x[k + j] ^= t << s
                    k = (k + j + 1) & ~j
                j >>= 1
                ones ^= ones << np.uint64(j)
            for i in range(64):
                out[2 * (64 * c + i) + h] = x[63 - i]


@compiled
def to_hash(nodes: Words, m: int, trees: int, n: int, out: Words) -> None:
    """The orthomorphism of each tree's first m nodes, tree by tree without gaps."""
    for i in range(trees):
        x, y = nodes[2 * i * n : 2 * i * n + 2 * m], out[2 * i * m : 2 * i * m + 2 * m]
        for j in range(m):
            low = x[2 * j]
            y[2 * j] = x[2 * j + 1]
            y[2 * j + 1] = low ^ x[2 * j + 1]


@compiled
def expand(nodes: Words, m: int, trees: int, n: int, hashed: Words, aes: Words, left: Words) -> None:
    """A level of m nodes to the next: left child AES(s(x)) ^ s(x), right child x ^ left; left sums go to `left`."""
    for i in range(trees):
        p = 2 * i * n
        x, right = nodes[p : p + 2 * m], nodes[p + 2 * m : p + 4 * m]
        c, d = hashed[2 * i * m : 2 * i * m + 2 * m], aes[2 * i * m : 2 * i * m + 2 * m]
        e, f = np.uint64(0), np.uint64(0)
        for j in range(m):
            g, h = c[2 * j] ^ d[2 * j], c[2 * j + 1] ^ d[2 * j + 1]
            e ^= g
            f ^= h
            right[2 * j] = x[2 * j] ^ g
            right[2 * j + 1] = x[2 * j + 1] ^ h
            x[2 * j] = g
            x[2 * j + 1] = h
        left[i, 0] = e
        left[i, 1] = f


@compiled
def repair(nodes: Words, m: int, trees: int, n: int, left: Words, total: Words, hole: Words, bits: Words, keys: Words) -> None:
    """The receiver's level after `expand`: its hole's children are no nodes; the one on the side `bits`, of XOR `keys`, is filled in.

    `total` is the XOR of all nodes that it knew of the level before, and becomes that of this one; no branch depends on `bits` or `hole`.
    """
    for i in range(trees):
        bit = bits[i]
        one, other = ZERO - bit, bit - ONE  # all ones where the bit is 1, where it is 0
        p = 2 * (i * n + np.int64(hole[i]))
        q = p + 2 * m
        for h in range(2):
            left_sum = left[i, h] ^ nodes[p + h] if m > 1 else ZERO
            right_sum = total[i, h] ^ left_sum
            nodes[p + h] = (keys[i, h] ^ left_sum) & other
            nodes[q + h] = (keys[i, h] ^ right_sum) & one
            total[i, h] = keys[i, h] ^ (left_sum & one) ^ (right_sum & other)
        hole[i] += np.uint64(m) & other


@compiled
def finish(nodes: Words, trees: int, n: int, hole: Words, receives: bool) -> None:
    """Lowest bits of leaves become 0; at the receiver the hole becomes the XOR of its other leaves, its lowest bit 1."""
    for i in range(trees):
        x = nodes[2 * i * n : 2 * i * n + 2 * n]
        if receives:
            j = np.int64(hole[i])
            x[2 * j] = ZERO
            x[2 * j + 1] = ZERO
        e, f = np.uint64(0), np.uint64(0)
        for k in range(n):
            x[2 * k] &= EVEN
            e ^= x[2 * k]
            f ^= x[2 * k + 1]
        if receives:
            j = np.int64(hole[i])
            x[2 * j] = e | ONE
            x[2 * j + 1] = f


@compiled
def encode(noise: Words, places: NDArray[Any], secret: Words, out: Words) -> None:
    """out_i = noise_i ^ the XOR of the secret's blocks at the ten public places of i: 16 bits each, and then their 17th bits."""
    for i in range(len(places)):
        x, y, high = noise[2 * i], noise[2 * i + 1], np.uint64(places[i, 10])
        for d in range(10):
            j = (np.uint64(places[i, d]) | ((high >> np.uint64(d)) & ONE) << np.uint64(16)) << ONE
            x ^= secret[j]
            y ^= secret[j | ONE]
        out[2 * i] = x
        out[2 * i + 1] = y


# ---- pads, and products that stand on them


@compiled
def lay_one(blocks: Words, count: int, first: int, out: Words) -> None:
    """What is hashed of the first blocks: their orthomorphism + their transfers' numbers."""
    for j in range(count):
        high = blocks[2 * j + 1]
        out[2 * j] = high ^ np.uint64(first + j)
        out[2 * j + 1] = high ^ blocks[2 * j]


@compiled
def lay_two(blocks: Words, count: int, first: int, delta: Words, out: Words) -> None:
    """The same for the blocks and for the blocks + delta, in turns."""
    for j in range(count):
        number = np.uint64(first + j)
        low, high = blocks[2 * j], blocks[2 * j + 1]
        out[4 * j] = high ^ number
        out[4 * j + 1] = high ^ low
        low ^= delta[0]
        high ^= delta[1]
        out[4 * j + 2] = high ^ number
        out[4 * j + 3] = high ^ low


@compiled
def scale_send(
    laid: Words, aes: Words, at: int, count: int, flips: Words, x: Words, bits: int, drop: int, xor: bool, share: Words, out: Words
) -> None:
    """The sender's part of x y for transfers `at` to `at + count`, in the order of y's bits, for each bit all elements.

    `laid` and `aes` are `lay_two`'s and its AES; the payloads p_0 + p_1 + x of bits - i bits go to the string `out`, -2^i p_0 to `share`.
    Where low bits are dropped, those of the first `drop` bits of y are p_0 + p_1 + 2^i x / 2^drop, rounded, and i counts from there on.
    """
    n = x.size
    i = at // n
    t = max(0, i - drop)
    e, width = at - i * n, bits - t
    place = n * (i * bits - t * (t - 1) // 2) + e * width
    word, have = place >> 6, place & 63
    ones, by, below = (~ZERO) >> np.uint64(64 - width), np.uint64(t), np.uint64(max(0, drop - 1 - i))
    acc = out[word]
    for j in range(count):
        f = at + j
        flip = ZERO - ((flips[f >> 6] >> np.uint64(f & 63)) & ONE)
        p, q = laid[4 * j] ^ aes[4 * j], laid[4 * j + 2] ^ aes[4 * j + 2]
        change = (p ^ q) & flip
        p ^= change
        q ^= change
        if xor:
            c = (p ^ q ^ x[e]) & ones
            share[e] ^= p
        else:
            c = (p + q + (((x[e] >> below) + ONE) >> ONE if i < drop else x[e])) & ones
            share[e] -= p << by
        acc |= c << np.uint64(have)
        have += width
        if have >= 64:
            out[word] = acc
            word += 1
            have -= 64
            acc = c >> np.uint64(width - have) if have else ZERO
        e += 1
        if e == n:
            e = 0
            i += 1
            if i > drop:
                width -= 1
                by += ONE
                ones >>= ONE
            elif i < drop:
                below -= ONE
    if have:
        out[word] = acc


@compiled
def scale_choose(
    laid: Words, aes: Words, blocks: Words, at: int, count: int, y: Words, drop: int, xor: bool, share: Words, flips: Words
) -> None:
    """The receiver's first part: where its choices differ from the random ones, into the string `flips`; its pads, by sign, to `share`."""
    n = y.size
    i = at // n
    e, of, by = at - i * n, np.uint64(i), np.uint64(max(0, i - drop))
    word, have = at >> 6, np.uint64(at & 63)
    acc = flips[word]
    for j in range(count):
        bit = (y[e] >> of) & ONE
        pad = laid[2 * j] ^ aes[2 * j]
        if xor:
            share[e] ^= pad
        else:
            minus = ZERO - bit
            share[e] += ((pad ^ minus) - minus) << by
        acc |= (bit ^ (blocks[2 * j] & ONE)) << have
        have += ONE
        if have == np.uint64(64):
            flips[word] = acc
            word += 1
            have = ZERO
            acc = ZERO
        e += 1
        if e == n:
            e = 0
            of += ONE
            if of > np.uint64(drop):
                by += ONE
    if have:
        flips[word] = acc


@compiled
def scale_finish(message: Words, y: Words, y_bits: int, bits: int, drop: int, xor: bool, share: Words) -> None:
    """The receiver's second part: the payloads that it chose, to `share`."""
    n = y.size
    place = 0
    for i in range(y_bits):
        t = max(0, i - drop)
        width, of, by = bits - t, np.uint64(i), np.uint64(t)
        ones = (~ZERO) >> np.uint64(64 - width)
        for e in range(n):
            word, have = place >> 6, place & 63
            c = message[word] >> np.uint64(have)
            if have + width > 64:
                c |= message[word + 1] << np.uint64(64 - have)
            c &= ones & (ZERO - ((y[e] >> of) & ONE))
            if xor:
                share[e] ^= c
            else:
                share[e] += c << by
            place += width


@compiled
def triples(laid: Words, aes: Words, blocks: Words, at: int, count: int, sends: bool, factor: Words, share: Words) -> None:
    """Random transfers of one bit, by bits, then by words: r_0 + r_1 and r_0 at the sender, its choice b and r_b at the receiver."""
    n = factor.size
    e, by = at % n, np.uint64(at // n)
    for j in range(count):
        if sends:
            p = laid[4 * j] ^ aes[4 * j]
            c = p ^ laid[4 * j + 2] ^ aes[4 * j + 2]
        else:
            p = laid[2 * j] ^ aes[2 * j]
            c = blocks[2 * j]
        factor[e] |= (c & ONE) << by
        share[e] |= (p & ONE) << by
        e += 1
        if e == n:
            e = 0
            by += ONE


@compiled
def table_send(pads: Words, flips: Words, table: Words, per: int, bits: int, ones: Words, out: Words) -> None:
    """The sender's masked tables (n, 2^m) to the string `out`, groups of `per` slots; pads (m n, 2, groups), ones as of `Table`."""
    n = len(table)
    m, groups = ones.shape
    full, width, word, have, acc = (~ZERO) >> np.uint64(64 - bits), per * bits, 0, 0, ZERO
    for i in range(n):
        for g in range(groups):
            c = ZERO
            for s in range(per):
                c |= (table[i, g * per + s] & full) << np.uint64(s * bits)
            for k in range(m):
                f = k * n + i
                flip = ZERO - ((flips[f >> 6] >> np.uint64(f & 63)) & ONE)
                near, far = pads[f, 0, g], pads[f, 1, g]
                c ^= near ^ ((near ^ far) & (flip ^ ones[k, g]))
            c &= (~ZERO) >> np.uint64(64 - width)
            acc |= c << np.uint64(have)
            have += width
            if have >= 64:
                out[word] = acc
                word += 1
                have -= 64
                acc = c >> np.uint64(width - have) if have else ZERO
    if have:
        out[word] = acc


@compiled
def table_choose(pads: Words, message: Words, index: Words, per: int, bits: int, m: int, out: Words) -> None:
    """The receiver's slots of the masked tables; pads (m n, 1, groups). All groups are read, so that no address depends on the index."""
    n, groups = index.size, pads.shape[2]
    full, width = (~ZERO) >> np.uint64(64 - bits), per * bits
    for i in range(n):
        group, slot = index[i] // np.uint64(per), index[i] % np.uint64(per)
        found = ZERO
        for g in range(groups):
            place = (i * groups + g) * width
            word, have = place >> 6, place & 63
            c = message[word] >> np.uint64(have)
            if have + width > 64:
                c |= message[word + 1] << np.uint64(64 - have)
            for k in range(m):
                c ^= pads[k * n + i, 0, g]
            found |= c & (ZERO - np.uint64(np.uint64(g) == group))
        out[i] = (found >> (slot * np.uint64(bits))) & full


# ---- strings of bits


@compiled
def pack(values: Words, bits: int, out: Words) -> None:
    """Lower bits of values, one behind the other."""
    ones, acc, have, word = (~ZERO) >> np.uint64(64 - bits), ZERO, 0, 0
    for i in range(values.size):
        c = values[i] & ones
        acc |= c << np.uint64(have)
        have += bits
        if have >= 64:
            out[word] = acc
            word += 1
            have -= 64
            acc = c >> np.uint64(bits - have) if have else ZERO
    if have:
        out[word] = acc


@compiled
def unpack(words: Words, bits: int, out: Words) -> None:
    """The inverse of `pack`."""
    ones = (~ZERO) >> np.uint64(64 - bits)
    for i in range(out.size):
        place = i * bits
        word, have = place >> 6, place & 63
        c = words[word] >> np.uint64(have)
        if have + bits > 64:
            c |= words[word + 1] << np.uint64(64 - have)
        out[i] = c & ones
