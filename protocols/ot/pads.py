"""Correlated transfers to random ones: their blocks hashed to pads, see `protocols.security.HASH_SPAN`."""

from __future__ import annotations

import hashlib

import numpy as np

from protocols.ot.words import Aes, Words
from protocols.security import HASH_SPAN


def orthomorphism(blocks: Words) -> Words:
    """(lo, hi) -> (hi, hi ^ lo)."""
    out = np.empty_like(blocks)
    out[..., 0] = blocks[..., 1]
    out[..., 1] = blocks[..., 1] ^ blocks[..., 0]
    return out


class Hash:
    """Of one direction of one session; numbers of transfers count from its beginning."""

    def __init__(self, session: bytes) -> None:
        self._session = session

    def pads(self, blocks: Words, first: int, words: int = 1) -> Words:
        """Pads (n, words) of the blocks (n, 2) of the transfers numbered from `first`."""
        out = np.empty((len(blocks), words), np.uint64)
        count = -(-words // 2)
        at = 0
        while at < len(blocks):
            span, skipped = divmod(first + at, HASH_SPAN)
            stop = min(len(blocks), at + HASH_SPAN - skipped)
            x = orthomorphism(blocks[at:stop])
            tweaked = np.repeat(x[:, None], count, 1)  # (transfers, blocks of a pad, 2)
            tweaked[..., 0] ^= np.arange(first + at, first + stop, dtype=np.uint64)[:, None]
            tweaked[..., 1] ^= np.arange(count, dtype=np.uint64)
            aes = Aes(hashlib.sha256(self._session + span.to_bytes(8, "little")).digest()[:16])
            found = aes.blocks(tweaked) ^ x[:, None]
            out[at:stop] = found.reshape(stop - at, 2 * count)[:, :words]
            at = stop
        return out
