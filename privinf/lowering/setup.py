"""What set-up sends, the masked weights, and what stands for it in the bundle."""

from __future__ import annotations

import hashlib
import math

import msgspec
from torch import Tensor

from protocols.linear import Weight, masked_weight
from protocols.ring import packed_size

SALT_BYTES = 32
MAX_SETUP = 1 << 36
"""Bytes; a model that asks for more is not believed."""


class SetupItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that set-up sends: its bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: memoryview) -> SetupItem:
        """What stands for this."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


class SetUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that set-up sends, by name: the masked weights. `salt` is random, and makes the bundle's hash say nothing to who lacks it."""

    items: dict[str, SetupItem]
    salt: bytes


def masked(encoded: Tensor, seed: bytes, weight: Weight) -> memoryview:
    """A weight as set-up sends it: W + B, packed."""
    return masked_weight(encoded, seed, weight)


def packed_bytes(weight: Weight) -> int:
    """Of a masked weight, on the wire and in its file."""
    return packed_size(math.prod(weight.shape), weight.bits)
