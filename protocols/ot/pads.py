"""Correlated transfers to random ones: their blocks hashed to pads, see `protocols.security.HASH_SPAN`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from protocols.ot import kernels
from protocols.ot.words import Aes, Words
from protocols.security import HASH_SPAN


class Span(NamedTuple):
    """Transfers hashed at once: `at` from the beginning; pads are laid ^ aes, at the sender two a transfer, one behind the other."""

    at: int
    size: int
    blocks: Words  # flat
    laid: Words
    aes: Words


class Hash:
    """Of one direction of one session, at one party; numbers of transfers count from its beginning. `delta` is the sender's, else None."""

    def __init__(self, session: bytes, delta: Words | None) -> None:
        self._session, self.delta = session, delta
        self.sides = 1 if delta is None else 2
        self._laid = np.empty(2 * self.sides * HASH_SPAN, np.uint64)
        self._aes = np.empty(2 * self.sides * HASH_SPAN + 2, np.uint64)

    def __repr__(self) -> str:
        return "Hash(secrets hidden)"

    def _key(self, span: int) -> Aes:
        return Aes(hashlib.sha256(self._session + span.to_bytes(8, "little")).digest()[:16])

    def spans(self, chunks: Sequence[Words], first: int, at: int = 0) -> Iterator[Span]:
        """Of the transfers numbered from `first` whose blocks (n, 2) are these; buffers are used again."""
        for chunk in chunks:
            done = 0
            while done < len(chunk):
                span, skipped = divmod(first + at, HASH_SPAN)
                count = min(len(chunk) - done, HASH_SPAN - skipped)
                blocks = chunk[done : done + count].reshape(-1)
                if self.delta is None:
                    kernels.lay_one(blocks, count, first + at, self._laid)
                else:
                    kernels.lay_two(blocks, count, first + at, self.delta, self._laid)
                self._key(span).into(self._laid, self._aes, 2 * self.sides * count)
                yield Span(at, count, blocks, self._laid, self._aes)
                done, at = done + count, at + count

    def pads(self, chunks: Sequence[Words], first: int, words: int = 1) -> Words:
        """(n, sides, words)."""
        out = np.empty((sum(map(len, chunks)), self.sides, words), np.uint64)
        blocks = -(-words // 2)
        for at, count, _, laid, aes in self.spans(chunks, first):
            found = out[at : at + count]
            shape = (count, self.sides, 2)
            laid, aes = laid[: 2 * self.sides * count].reshape(shape), aes[: 2 * self.sides * count].reshape(shape)
            if words <= 2:
                np.bitwise_xor(laid[..., :words], aes[..., :words], out=found)
                continue
            more = np.repeat(laid[:, :, None], blocks, 2)
            more[..., 1] ^= np.arange(blocks, dtype=np.uint64)
            found[:] = (self._key((first + at) // HASH_SPAN).blocks(more) ^ more).reshape(count, self.sides, -1)[..., :words]
        return out
