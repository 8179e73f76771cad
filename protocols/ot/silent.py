"""The extension for the bulk: hundreds of thousands of correlated transfers from one short message, a sixth of a byte each.

Source: Ferret (Yang, Weng, Lan, Zhang, Wang: CCS 2020, ePrint 2020/924), against parties that follow the protocol, with single-point
transfers by half-trees (Guo, Yang, Wang, Zhang, Xie, Liu, Zhao: EUROCRYPT 2023, ePrint 2022/1431). One extension, + being XOR, from
k + t h correlated transfers, of which both hold blocks as in `iknp`, with t, h and k of `protocols.security.Lpn`:

1. Sender: t trees of height h whose root's children are random r and r + delta; a node's left child is H(x), its right child x + H(x), so
   that each level's XOR is delta. Of each level it sends the XOR of the left nodes, masked by one transfer's block.
2. Receiver: its random choices in those transfers name a leaf in each tree, and what it unmasks gives it all other leaves. Their XOR
   is that leaf + delta. So both hold correlated transfers whose choices are e, t random unit vectors of length 2^h side by side.
3. Both add, to the i-th leaf, ten of the k first blocks, at places that are public and fixed. Choices become e + A r, pseudorandom by the
   hardness of learning parity with regular noise. The last k + t h outputs are the next extension's, and leave with it.

H(x) = AES_K(s(x)) + s(x), as in `pads`, K fresh for each batch of trees. One message, from the sender.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocols.ot import kernels
from protocols.ot.words import Aes, Words
from protocols.security import LPN_WEIGHT, Lpn

BATCH = 32  # trees at a time, so that they stay in a core's cache
KEPT = 6  # extensions whose memory is kept for the next ones


@lru_cache(maxsize=2)
def places(lpn: Lpn) -> NDArray[np.uint16]:
    """Where each output reads, (outputs, 11): ten places' lower 16 bits, and a word of their 17th bits.

    AES of counters, under a key that says what they are for, gives 32 bits for each, which are scaled to [0, k).
    """
    counters = np.zeros((-(-lpn.outputs * LPN_WEIGHT // 4), 2), np.uint64)
    counters[:, 0] = np.arange(len(counters))
    key = hashlib.sha256(f"privinf places {lpn.trees} {lpn.height} {lpn.dimension}".encode()).digest()[:16]
    drawn = Aes(key).blocks(counters).reshape(-1).view(np.uint32)[: lpn.outputs * LPN_WEIGHT]
    found = np.zeros((lpn.outputs, LPN_WEIGHT + 1), np.uint16)
    for d in range(LPN_WEIGHT):
        at = drawn[d::LPN_WEIGHT].astype(np.uint64) * np.uint64(lpn.dimension) >> np.uint64(32)
        found[:, d] = at & np.uint64(0xFFFF)
        found[:, LPN_WEIGHT] |= (at >> np.uint64(16) << np.uint64(d)).astype(np.uint16)
    found.flags.writeable = False
    return found


class Memory:
    """What extensions are written to, used again when all of one was given back: fresh pages cost up to a third of the work."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._free: list[Words] = []
        self._lent: dict[int, tuple[Words, int]] = {}  # by identity: the whole, and how many of its words are out

    def lend(self, used: int) -> Words:
        """The whole of one, of which `used` words are to come back."""
        whole = self._free.pop() if self._free else np.empty(self._words, np.uint64)
        self._lent[id(whole)] = whole, used
        return whole

    def give_back(self, part: Words) -> None:
        """A part that nobody reads again; what is no part of something lent is nothing to us."""
        found = self._lent.get(id(part.base))
        if found is None:
            return
        whole, left = found[0], found[1] - part.size
        assert left >= 0, "given back twice"
        if left:
            self._lent[id(whole)] = whole, left
            return
        del self._lent[id(whole)]
        if len(self._free) < KEPT:
            self._free.append(whole)


class Extender:
    """One party's end. `seed` (k + t h, 2) are transfers that serve nothing else; `delta` is the sender's, and None at the receiver."""

    def __init__(self, lpn: Lpn, session: bytes, seed: Words, delta: Words | None) -> None:
        self.lpn, self._session, self._delta = lpn, session, delta
        self._seed = seed.reshape(-1).copy()
        self._count = 0
        self.memory = Memory(2 * lpn.outputs)
        leaves = 1 << lpn.height
        self._nodes = np.empty(2 * BATCH * leaves, np.uint64)
        self._hashed = np.empty(BATCH * leaves, np.uint64)
        self._aes = np.empty(BATCH * leaves + 2, np.uint64)

    def __repr__(self) -> str:
        return "Extender(secrets hidden)"

    def send(self) -> tuple[Words, Words]:
        """The message (t, h, 2), and the next transfers (net, 2)."""
        assert self._delta is not None
        lpn = self.lpn
        message = self._masks().copy()
        roots = np.frombuffer(os.urandom(16 * lpn.trees), np.uint64).reshape(-1, 2)
        out = self.memory.lend(2 * lpn.net)
        for start in range(0, lpn.trees, BATCH):
            trees = min(BATCH, lpn.trees - start)
            left = roots[start : start + trees].copy()
            nodes = self._nodes.reshape(BATCH, -1, 2)
            nodes[:trees, 0] = left
            nodes[:trees, 1] = left ^ self._delta
            aes = self._key(start)
            for level in range(lpn.height):
                if level:
                    self._expand(aes, 1 << level, trees, left)
                message[start : start + trees, level] ^= left
            self._finish(start, trees, np.empty(0, np.uint64), out)
        return message, self._next(out)

    def receive(self, message: Words) -> Words:
        """The next transfers (net, 2)."""
        lpn = self.lpn
        masks = self._masks()
        keys = np.ascontiguousarray((masks ^ message).swapaxes(0, 1))  # (h, t, 2)
        bits = np.ascontiguousarray((masks[:, :, 0] & kernels.ONE).T)
        out = self.memory.lend(2 * lpn.net)
        for start in range(0, lpn.trees, BATCH):
            trees = min(BATCH, lpn.trees - start)
            left, total = np.zeros((trees, 2), np.uint64), np.zeros((trees, 2), np.uint64)
            hole = np.zeros(trees, np.uint64)
            aes = self._key(start)
            for level in range(lpn.height):
                if level:
                    self._expand(aes, 1 << level, trees, left)
                at = slice(start, start + trees)
                kernels.repair(self._nodes, 1 << level, trees, 1 << lpn.height, left, total, hole, bits[level, at], keys[level, at])
            self._finish(start, trees, hole, out)
        return self._next(out)

    def _masks(self) -> Words:
        """The transfers for the trees, (t, h, 2)."""
        return self._seed[2 * self.lpn.dimension :].reshape(self.lpn.trees, self.lpn.height, 2)

    def _key(self, start: int) -> Aes:
        """Of one batch of trees of one extension."""
        name = b"trees" + self._session + self._count.to_bytes(8, "little") + start.to_bytes(4, "little")
        return Aes(hashlib.sha256(name).digest()[:16])

    def _expand(self, aes: Aes, m: int, trees: int, left: Words) -> None:
        n = 1 << self.lpn.height
        kernels.to_hash(self._nodes, m, trees, n, self._hashed)
        aes.into(self._hashed, self._aes, 2 * m * trees)
        kernels.expand(self._nodes, m, trees, n, self._hashed, self._aes, left)

    def _finish(self, start: int, trees: int, hole: Words, out: Words) -> None:
        """A batch's leaves to outputs."""
        n = 1 << self.lpn.height
        kernels.finish(self._nodes, trees, n, hole, self._delta is None)
        first, last = start * n, (start + trees) * n
        kernels.encode(self._nodes, places(self.lpn)[first:last], self._seed, out[2 * first : 2 * last])

    def _next(self, out: Words) -> Words:
        net = 2 * self.lpn.net
        self._seed = out[net:].copy()
        self._count += 1
        return out[:net].reshape(-1, 2)
