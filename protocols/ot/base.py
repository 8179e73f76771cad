"""Base transfers: 128 random keys of one party's choice among 128 pairs of the other's, on the group of Ed25519.

Source: Chou and Orlandi, The simplest protocol for oblivious transfer (LATINCRYPT 2015, ePrint 2015/267), against parties that follow
the protocol; the group's arithmetic is libsodium's, by PyNaCl. Steps, + being the group's:

1. sender: a random, sends A = a G; 2. chooser: for bit c_i, b_i random, sends B_i = b_i G + c_i A, and its key is H(i, A, B_i, b_i A);
3. sender: its keys are H(i, A, B_i, a B_i) and H(i, A, B_i, a B_i - a A).

The chooser's bits are hidden perfectly, the sender's other keys by the computational Diffie-Hellman problem, with H SHA-256 as a random
oracle. Points that arrive must be canonical, on the curve, in the subgroup of prime order and not its identity.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from nacl import bindings, exceptions
from numpy.typing import NDArray

from protocols.errors import TransportError
from protocols.ot.words import Words

POINT_WORDS = 4
_IDENTITY = (1).to_bytes(32, "little")


def _scalar() -> bytes:
    return bindings.crypto_core_ed25519_scalar_reduce(os.urandom(64))


def _point(words: Words, party: str) -> bytes:
    """What the peer sent as a point."""
    raw = words.tobytes()
    if not bindings.crypto_core_ed25519_is_valid_point(raw):
        raise TransportError("the peer sent a base transfer's point that is none of the group", party=party)
    return raw


def _key(context: bytes, index: int, first: bytes, point: bytes, secret: bytes) -> bytes:
    return hashlib.sha256(b"privinf base transfer" + context + index.to_bytes(4, "little") + first + point + secret).digest()[:16]


def session_of(context: bytes, first: Words, points: Words) -> bytes:
    """A name for what follows from these transfers that no other has: both parties' fresh points, hashed."""
    return hashlib.sha256(b"privinf transfers" + context + first.tobytes() + points.tobytes()).digest()


class BaseSender:
    """Who will hold both keys of each pair. `context` keeps directions apart."""

    def __init__(self, context: bytes, party: str) -> None:
        self._context, self._party = context, party
        self._a = _scalar()
        self._first = bindings.crypto_scalarmult_ed25519_base_noclamp(self._a)

    def __repr__(self) -> str:
        return "BaseSender(secrets hidden)"

    def first(self) -> Words:
        """A, the first message, (4,)."""
        return np.array(np.frombuffer(self._first, np.uint64))

    def keys(self, points: Words) -> list[tuple[bytes, bytes]]:
        """All pairs, from the answer (n, 4); TransportError for what is no point."""
        try:
            shift = bindings.crypto_scalarmult_ed25519_noclamp(self._a, self._first)
            pairs = []
            for index, words in enumerate(points):
                point = _point(words, self._party)
                zero = bindings.crypto_scalarmult_ed25519_noclamp(self._a, point)
                one = bindings.crypto_core_ed25519_sub(zero, shift)
                if one == _IDENTITY:
                    raise TransportError("the peer sent a base transfer's point that is its peer's own", party=self._party)
                pairs.append((_key(self._context, index, self._first, point, zero), _key(self._context, index, self._first, point, one)))
        except exceptions.CryptoError:
            raise TransportError("a base transfer's point led to none of the group", party=self._party) from None
        return pairs


def choose(context: bytes, party: str, first: Words, bits: NDArray[np.uint8]) -> tuple[Words, list[bytes]]:
    """The chooser's answer (n, 4) to the first message, and its keys; TransportError for what is no point."""
    start = _point(first, party)
    shifts: Sequence[bytes] = (_IDENTITY, start)
    points, keys = [], []
    try:
        for index, bit in enumerate(bits.tolist()):
            b = _scalar()
            point = bindings.crypto_core_ed25519_add(bindings.crypto_scalarmult_ed25519_base_noclamp(b), shifts[bit])
            points.append(point)
            keys.append(_key(context, index, start, point, bindings.crypto_scalarmult_ed25519_noclamp(b, start)))
    except exceptions.CryptoError:
        raise TransportError("a base transfer's point led to none of the group", party=party) from None
    return np.array(np.frombuffer(b"".join(points), np.uint64)).reshape(-1, POINT_WORDS), keys
