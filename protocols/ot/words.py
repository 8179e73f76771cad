"""Arrays of 64-bit words, which is what transfers are made of and what they send: strings of bits, blocks of 128, AES over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from protocols.ot import kernels

Words = kernels.Words
"""Of any shape; a block of 128 bits is a last axis of two words, the lower one first."""


def words_of(x: Tensor) -> Words:
    """The same memory as unsigned words."""
    return x.cpu().contiguous().numpy().view(np.uint64)


def tensor_of(words: NDArray[Any]) -> Tensor:
    """The same memory as int64."""
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))


def mask(bits: int) -> np.uint64:
    """A word of so many ones, 0 to 64."""
    return np.uint64((1 << bits) - 1)


def string_words(count: int, bits: int) -> int:
    """Words that `count` values of `bits` bits take, packed."""
    return -(-count * bits // 64)


def pack(values: Words, bits: int) -> Words:
    """The lower `bits` bits of each value, one behind the other, in words; the last is filled with zeros."""
    out = np.empty(string_words(values.size, bits), np.uint64)
    kernels.pack(np.ascontiguousarray(values).reshape(-1), bits, out)
    return out


def unpack(words: Words, count: int, bits: int) -> Words:
    """The inverse of `pack`."""
    out = np.empty(count, np.uint64)
    kernels.unpack(words, bits, out)
    return out


class Aes:
    """AES-128 on arrays of blocks under one key."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()

    def __repr__(self) -> str:
        return "Aes(key hidden)"

    def blocks(self, x: Words) -> Words:
        """Each block by itself; contiguous, a multiple of two words."""
        out = np.empty(x.size + 2, np.uint64)
        self.into(x.reshape(-1), out, x.size)
        return out[:-2].reshape(x.shape)

    def into(self, x: Words, out: Words, words: int) -> None:
        """The first `words` words, flat; `out` has room for one block more, as the library wants it."""
        self._encryptor.update_into(x.data.cast("B")[: 8 * words], out.data.cast("B")[: 8 * words + 16])
