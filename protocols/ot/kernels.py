"""What of transfers is too slow in NumPy, compiled: `tests/ot/plain.py` has the twins. A block of 128 bits is two words, the lower first.

A batch of B trees of n = 2^h leaves lies tree by tree in `nodes`, flat; a level of m nodes is the first m blocks of each tree's, and
the children of node j are j and j + m.
"""

from __future__ import annotations

import numpy as np

from protocols.compiled import compiled
from protocols.ot.words import Words

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
def encode(noise: Words, places: np.ndarray, secret: Words, out: Words) -> None:
    """out_i = noise_i ^ the XOR of the secret's blocks at the ten public places of i."""
    for i in range(len(places) // 10):
        x, y = noise[2 * i], noise[2 * i + 1]
        for d in range(10):
            j = np.uint64(places[10 * i + d]) << ONE
            x ^= secret[j]
            y ^= secret[j | ONE]
        out[2 * i] = x
        out[2 * i + 1] = y
