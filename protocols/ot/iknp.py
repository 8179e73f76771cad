"""The extension to begin with: any number of correlated transfers from 128 base transfers, 16 bytes each.

Source: Ishai, Kilian, Nissim, Petrank (CRYPTO 2003), with the roles of the base transfers reversed, and columns of a pseudorandom
generator as in ePrint 2013/552. The sender holds delta, 128 bits of which the lowest is 1; a transfer is q_i at the sender and t_i at
the receiver with q_i = t_i ^ b_i delta, b_i random at the receiver. The lowest bit of t_i is b_i, that of q_i is 0.

One message from the receiver, u = G(k_0) ^ G(k_1) ^ b for each of 128 rows; a row's keystream is read on, never twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from protocols.ot import kernels
from protocols.ot.words import Words
from protocols.security import IKNP_ROWS

_EVEN = np.uint64(2**64 - 2)


def new_delta() -> NDArray[np.uint8]:
    """A sender's correlation, by bits; its lowest bit is 1."""
    bits = np.unpackbits(np.frombuffer(os.urandom(IKNP_ROWS // 8), np.uint8), bitorder="little")
    bits[0] = 1
    return bits


def _streams(keys: Sequence[bytes]) -> list[CipherContext]:
    return [Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor() for key in keys]


def _rows(streams: Sequence[CipherContext], words: int) -> Words:
    """The next of each stream, (128, words)."""
    zeros = bytes(8 * words)
    return np.stack([np.frombuffer(stream.update(zeros), np.uint64) for stream in streams])


def transpose(rows: Words) -> Words:
    """Rows of bits (128, w) to blocks (64 w, 2)."""
    out = np.empty(2 * 64 * rows.shape[1], np.uint64)
    kernels.transpose(rows, out)
    return out.reshape(-1, 2)


class IknpSender:
    """Who holds delta, and of each base transfer the key of its bit."""

    def __init__(self, delta: NDArray[np.uint8], keys: Sequence[bytes]) -> None:
        self._delta, self._streams = delta, _streams(keys)

    def __repr__(self) -> str:
        return "IknpSender(secrets hidden)"

    def extend(self, u: Words) -> Words:
        """64 w blocks from the message (128, w)."""
        q = _rows(self._streams, u.shape[1])
        q ^= u & (np.uint64(0) - self._delta.astype(np.uint64))[:, None]
        blocks = transpose(q)
        blocks[:, 0] &= _EVEN
        return blocks


class IknpReceiver:
    """Who holds both keys of each base transfer."""

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self._zero, self._one = _streams([zero for zero, _ in pairs]), _streams([one for _, one in pairs])

    def __repr__(self) -> str:
        return "IknpReceiver(secrets hidden)"

    def extend(self, words: int) -> tuple[Words, Words]:
        """The message (128, words), and 64 `words` blocks."""
        choice = np.frombuffer(os.urandom(8 * words), np.uint64)
        t = _rows(self._zero, words)
        u = _rows(self._one, words)
        u ^= t
        u ^= choice
        t[0] = choice
        return u, transpose(t)
