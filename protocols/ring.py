"""Arithmetic in Z_2^k on int64 tensors, and the packing of ring elements into bytes.

An element of Z_2^k, k <= 64, is held in an int64 whose upper 64 - k bits are arbitrary: sums and products modulo
2^64 are right modulo 2^k, so that nothing is reduced until a value is shifted, compared or sent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.memo import Memo


def reduce(x: Tensor, bits: int) -> Tensor:
    """The representative of x in [0, 2^bits); at 64 bits the int64 itself."""
    return x if bits == 64 or x.is_meta else x & ((1 << bits) - 1)


def signed(x: Tensor, bits: int) -> Tensor:
    """The representative of x in [-2^(bits-1), 2^(bits-1))."""
    return x if bits == 64 else (x << (64 - bits)) >> (64 - bits)


def shift_right(x: Tensor, shift: int, bits: int) -> Tensor:
    """Logical right shift of the representative in [0, 2^bits)."""
    if shift == 0 or x.is_meta:
        return reduce(x, bits)
    return reduce(x, bits) >> shift if bits < 64 else (x >> shift) & ((1 << (64 - shift)) - 1)


def encode(x: Tensor, frac: int) -> Tensor:
    """Rounds reals to integers with `frac` fraction bits; same shape, int64."""
    return torch.round(x.double() * 2.0**frac).to(torch.int64)


def decode(x: Tensor, bits: int, frac: int) -> Tensor:
    """The real value (float64) of ring elements with `frac` fraction bits."""
    return signed(x, bits).double() / 2.0**frac


def parity(x: Tensor, width: int = 64) -> Tensor:
    """XOR of the lowest `width` bits (a power of two) of every element; 0 or 1."""
    while width > 1:
        width //= 2
        x = x ^ (x >> width)
    return x & 1


@lru_cache(maxsize=1 << 12)
def blank(*shape: int) -> Tensor:
    """A value that is not known in this walk, of which only the shape counts: a meta tensor, the same for all values of a shape.

    Local computation on such values is skipped, not carried out on shapes: torch's shape functions are slow.
    """
    return torch.empty(shape, dtype=torch.int64, device="meta")


def known(*values: Tensor) -> bool:
    """Whether all of them have values in this walk."""
    for value in values:  # noqa: SIM110  (it is asked a thousand times a pass, and a generator costs more than the question)
        if value.is_meta:
            return False
    return True


def in_a_row(values: Sequence[Tensor], axis: int) -> Tensor:
    """One after the other along an axis, as `torch.cat`, whose way with shapes alone loads a compiler."""
    if known(*values):
        return torch.cat(list(values), axis)
    shape = list(values[0].shape)
    shape[axis] = sum(value.shape[axis] for value in values)
    return blank(*shape)


def common_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of a + b."""
    if a.shape == b.shape:
        return tuple(a.shape)
    long, short = (a.shape, b.shape) if a.dim() >= b.dim() else (b.shape, a.shape)
    padded = (1,) * (len(long) - len(short)) + tuple(short)
    return tuple(max(m, n) if min(m, n) else 0 for m, n in zip(long, padded, strict=True))


def flat(x: Tensor) -> np.ndarray:
    """A tensor of the CPU as compiled loops read it, (n,); where it lies in order, the same memory."""
    return array((x if x.is_contiguous() else x.contiguous()).view(-1))


def array(x: Tensor) -> np.ndarray:
    """A tensor's memory, as `Tensor.numpy`, which takes as long as several operators where what this thread computes is recorded."""
    if not kernels.watched():
        return x.numpy()
    with torch._C._DisableTorchDispatch():
        return x.numpy()


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, or a blank of its shape."""
    return a + b if known(a, b) else blank(*common_shape(a, b))


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """a - b, or a blank of its shape."""
    return a - b if known(a, b) else blank(*common_shape(a, b))


def multiply(a: Tensor, b: int | Tensor) -> Tensor:
    """a * b, or a blank of its shape."""
    if isinstance(b, int):
        return a if a.is_meta else a * b
    return a * b if known(a, b) else blank(*common_shape(a, b))


def raised(a: Tensor, bits: int) -> Tensor:
    """a 2^bits, or a blank of its shape."""
    return a if a.is_meta else a << bits


def nbytes(x: Tensor) -> int:
    """What a tensor takes."""
    return x.nbytes


@Memo(256 * 2**20).kept(nbytes)
def _moved(constant: Tensor, device: torch.device) -> Tensor:
    return constant.to(device)


def like(constant: Tensor, x: Tensor) -> Tensor:
    """A public constant, which nobody changes, on x's device, so that both can meet in one operator; it is moved there once."""
    return placed(constant, x.device)


def placed(constant: Tensor, device: torch.device | str) -> Tensor:
    """The same, on this device."""
    device = torch.device(device)
    return constant if constant.device == device else _moved(constant, device)


BLOCK = 1 << 18  # elements, a multiple of 8
FEW = 512  # elements up to which all planes are made at once: fewer calls, each slower


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed elements: no more than their bits, each plane of bits rounded up to whole bytes."""
    return count * (bits // 8) + (bits % 8) * (-(-count // 8))


@lru_cache
def _words(bits: int) -> list[tuple[np.dtype[np.generic], int, int]]:
    """How an element's whole bytes are cut into machine words, highest bits last: (type, its bytes, position in bits)."""
    words, at = [], 0
    for size in (8, 4, 2, 1):
        if bits // 8 & size:
            words.append((np.dtype(f"<{'i' if size == 8 else 'u'}{size}"), size, 8 * at))
            at += size
    return words


def pack(x: Tensor, bits: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Ring elements to `packed_size` bytes, little endian; the upper bits of the int64 do not travel.

    In sections, since copying words is fast and copying odd numbers of bytes is not: the elements' lowest words of 8, 4, 2
    and 1 bytes, as many as their whole bytes need, then a plane for each remaining bit. Of 64 bits the elements' own memory serves.
    """
    flat = (x.reshape(-1) if x.is_cpu else x.reshape(-1).cpu()).numpy()
    if bits == 64 and x.dtype is torch.int64 and flat.flags.c_contiguous and sys.byteorder == "little":
        return flat.view(np.uint8)
    out = np.empty(packed_size(flat.size, bits), np.uint8)
    if kernels.fast is not None and x.dtype is torch.int64 and flat.flags.c_contiguous:
        kernels.fast.pack(flat, bits, out)
    else:
        _pack_plain(flat, bits, out)
    return out


def _pack_plain(flat: np.ndarray, bits: int, out: np.ndarray) -> None:
    for start in range(0, flat.size, BLOCK):  # large tensors block by block, so that nothing of their size is made on the way
        stop = min(start + BLOCK, flat.size)
        part, at = flat[start:stop], 0
        for word, size, place in _words(bits):
            section = out[at + start * size : at + stop * size].view(word)
            section[:] = part >> place if place else part  # the cast drops the upper bits
            at += flat.size * size
        if bits % 8:
            rest = (part >> (bits - bits % 8)).astype(np.uint8)
            planes = out[at:].reshape(bits % 8, -1)[:, start // 8 : -(-stop // 8)]
            if flat.size <= FEW:
                planes[:] = np.packbits(np.unpackbits(rest[None], axis=0, count=bits % 8, bitorder="little"), axis=1, bitorder="little")
            else:
                for bit, plane in enumerate(planes):
                    plane[:] = np.packbits(rest & (1 << bit), bitorder="little")  # any value but 0 is a 1


class Packing:
    """What `pack` makes of `count` elements, given piece by piece: of a large value only what travels is ever whole."""

    def __init__(self, count: int, bits: int) -> None:
        self.out = np.empty(packed_size(count, bits), np.uint8)
        self._count, self._bits, self._at = count, bits, 0

    def add(self, x: Tensor) -> None:
        """The next elements; of all pieces but the last a multiple of 8."""
        part, start, count = pack(x, self._bits), self._at, self._count
        to, read = 0, 0
        for _, size, _ in _words(self._bits):
            own = x.numel() * size
            self.out[to + start * size :][:own] = part[read : read + own]
            to, read = to + count * size, read + own
        if planes := self._bits % 8:
            width = -(-x.numel() // 8)
            self.out[to:].reshape(planes, -1)[:, start // 8 :][:, :width] = part[read:].reshape(planes, width)
        self._at += x.numel()


def unpack(data: memoryview | np.ndarray, shape: tuple[int, ...], bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The inverse of `pack`; representatives in [0, 2^bits)."""
    raw, count = np.frombuffer(data, np.uint8), math.prod(shape)
    out = np.empty(count, np.int64)
    if kernels.fast is not None and raw.size >= packed_size(count, bits):
        kernels.fast.unpack(raw, bits, out)
    else:
        _unpack_plain(raw, bits, out)
    found = torch.from_numpy(out.reshape(shape))
    return found if device == "cpu" else found.to(device)


def _unpack_plain(raw: np.ndarray, bits: int, out: np.ndarray) -> None:
    count = out.size
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        part, at = out[start:stop], 0
        for word, size, place in _words(bits):
            section = raw[at + start * size : at + stop * size].view(word)
            if place:
                part |= section.astype(np.int64) << place
            else:
                part[:] = section
            at += count * size
        if bits % 8:
            planes = raw[at:].reshape(bits % 8, -1)[:, start // 8 : -(-stop // 8)]
            if count <= FEW:
                rest = np.packbits(np.unpackbits(planes, axis=1, count=part.size, bitorder="little"), axis=0, bitorder="little")[0]
            else:
                rest = np.zeros(part.size, np.uint8)
                for bit, plane in enumerate(planes):
                    rest |= np.unpackbits(plane, count=part.size, bitorder="little") << bit
            if bits < 8:
                part[:] = rest
            else:
                part |= rest.astype(np.int64) << (bits - bits % 8)
