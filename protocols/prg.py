"""The pseudorandom generator: AES-128 in counter mode, keyed per session and purpose.

A stream is named by a counter that is never used twice under one key, so that a mask exists once. The block
cipher is the maintained one of the package `cryptography`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from torch import Tensor

from protocols import kernels
from protocols.ring import reduce

SEED_BYTES = 16
BLOCK = 16
_ZEROS = bytes(1 << 20)
_FEW = 256  # blocks
_WORDS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


def word_size(bits: int) -> int:
    """Bytes of the keystream that an element of Z_2^bits takes."""
    return 1 if bits <= 8 else 2 if bits <= 16 else 4 if bits <= 32 else 8


def new_seed() -> bytes:
    """A fresh seed from the operating system."""
    return secrets.token_bytes(SEED_BYTES)


def derive(seed: bytes, purpose: str) -> bytes:
    """A key for one purpose, so that two purposes never share a stream."""
    return HKDFExpand(hashes.SHA256(), SEED_BYTES, purpose.encode()).derive(seed)


class Prg:
    """Streams of uniform ring elements under one key; used by one thread at a time."""

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)
        self._blocks = Cipher(self._algorithm, modes.ECB()).encryptor()  # of counters, each once: this is counter mode

    def __repr__(self) -> str:
        return "Prg(key hidden)"

    def stream(self, counter: int) -> Stream:
        """The stream with this name, below 2^64; the caller never asks for one twice for two purposes."""
        return Stream(self._algorithm, self._blocks, counter)

    def starts(
        self, counters: Sequence[int] | np.ndarray, blocks: Sequence[int] | np.ndarray
    ) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The first blocks[p] blocks of each of several streams, side by side; by compiled code alone."""
        total = int(np.sum(blocks))
        asked, out = np.empty(total * BLOCK, np.uint8), np.empty((total + 1) * BLOCK, np.uint8)
        kernels.fast.counters_many(np.array(counters, np.int64), np.array(blocks, np.int64), asked)
        self._blocks.update_into(asked.data, out.data)
        return out


class Stream:
    """One keystream, read front to back."""

    def __init__(self, algorithm: algorithms.AES, blocks: CipherContext, counter: int) -> None:
        self._algorithm, self._blocks, self._counter, self._read = algorithm, blocks, counter, 0
        self._name = counter.to_bytes(8, "big")

    def __repr__(self) -> str:
        return "Stream(hidden)"

    def raw(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The next `size` bytes."""
        # 64 bits name the stream, 64 bits count its blocks
        block, skipped = divmod(self._read, BLOCK)
        self._read += size
        needed = skipped + size
        count = -(-needed // BLOCK)
        out = np.empty((count + 1) * BLOCK, np.uint8)  # the library wants room for one block more
        if count <= _FEW:  # setting up counter mode takes longer than encrypting so little
            if kernels.fast is not None and self._counter < 1 << 63:
                counters = np.empty(count * BLOCK, np.uint8)
                kernels.fast.counters(self._counter, block, count, counters)
                asked = counters.data
            else:
                pairs = np.empty((count, 2), ">u8")
                pairs[:, 0] = np.frombuffer(self._name, ">u8")
                pairs[:, 1] = np.arange(block, block + count)
                asked = memoryview(pairs.tobytes())
            self._blocks.update_into(asked, out.data)
        else:
            encryptor = Cipher(self._algorithm, modes.CTR(self._name + block.to_bytes(8, "big"))).encryptor()
            view, zeros = out.data, memoryview(_ZEROS)
            for start in range(0, needed, len(_ZEROS)):
                encryptor.update_into(zeros[: min(len(_ZEROS), needed - start)], view[start:])
        return out[skipped:needed].copy() if skipped else out[:needed]  # aligned, whatever it is read as

    def uniform(self, shape: tuple[int, ...], bits: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform elements of Z_2^bits, int64; the keystream is read in the narrowest machine word that holds them."""
        count, size = math.prod(shape), word_size(bits)
        raw = self.raw(count * size)
        if kernels.fast is not None and device == "cpu":
            out = np.empty(count, np.int64)
            kernels.fast.uniform(raw, size, bits, out)
            return torch.from_numpy(out.reshape(shape))
        # AES runs on the CPU; narrow words move, and become int64 where they are used. What a sign extends is cleared
        moved = torch.from_numpy(raw.view(_WORDS[size]).reshape(shape))
        return reduce((moved if device == "cpu" else moved.to(device)).to(torch.int64), bits)

    def below(self, shape: tuple[int, ...], modulus: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform elements of Z_modulus, int64, 1 < modulus < 2^63; at statistical distance 0.

        Words of as many bits as the largest element has are read, and those that are no elements left out: fewer than half, on average.
        """
        count, bits = math.prod(shape), (modulus - 1).bit_length()
        out, at = torch.empty(count, dtype=torch.int64), 0
        while at < count:
            words = self.uniform((count - at,), bits)
            fit = words[words < modulus]
            out[at : at + len(fit)] = fit
            at += len(fit)
        return out.reshape(shape) if device == "cpu" else out.reshape(shape).to(device)
