"""The pseudorandom generator: AES-128 in counter mode, keyed per session and purpose.

A stream is named by a counter that is never used twice under one key, so that a mask exists once. The block
cipher is the maintained one of the package `cryptography`.
"""

from __future__ import annotations

import math
import secrets
from functools import cached_property

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from torch import Tensor

from protocols.ring import reduce

SEED_BYTES = 16
_ZEROS = bytes(1 << 20)


def new_seed() -> bytes:
    """A fresh seed from the operating system."""
    return secrets.token_bytes(SEED_BYTES)


def derive(seed: bytes, purpose: str) -> bytes:
    """A key for one purpose, so that two purposes never share a stream."""
    return HKDFExpand(hashes.SHA256(), SEED_BYTES, purpose.encode()).derive(seed)


class Prg:
    """Streams of uniform ring elements under one key."""

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)

    def __repr__(self) -> str:
        return "Prg(key hidden)"

    def stream(self, counter: int) -> Stream:
        """The stream with this name, below 2^64; the caller never asks for one twice for two purposes."""
        return Stream(self._algorithm, counter)


class Stream:
    """One keystream, read front to back."""

    def __init__(self, algorithm: algorithms.AES, counter: int) -> None:
        self._algorithm, self._name = algorithm, counter.to_bytes(8, "big")

    def __repr__(self) -> str:
        return "Stream(hidden)"

    @cached_property
    def _encryptor(self) -> CipherContext:
        # when it is first read: many streams never are. 64 bits name the stream, 64 bits count its blocks
        return Cipher(self._algorithm, modes.CTR(self._name + bytes(8))).encryptor()

    def raw(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The next `size` bytes."""
        out = np.empty(size + 16, np.uint8)  # the library wants room for one block more
        view, zeros = out.data, memoryview(_ZEROS)
        for start in range(0, size, len(_ZEROS)):
            self._encryptor.update_into(zeros[: min(len(_ZEROS), size - start)], view[start:])
        return out[:size]

    def uniform(self, shape: tuple[int, ...], bits: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform elements of Z_2^bits, int64; the keystream is read in the narrowest machine word that holds them."""
        count = math.prod(shape)
        word: type[np.generic] = np.uint8 if bits <= 8 else np.int16 if bits <= 16 else np.int32 if bits <= 32 else np.int64
        values = self.raw(count * np.dtype(word).itemsize).view(word)
        # AES runs on the CPU; narrow words move, and become int64 where they are used. What a sign extends is cleared
        return reduce(torch.from_numpy(values.reshape(shape)).to(device).to(torch.int64), bits)
