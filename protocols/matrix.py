"""Matrix products modulo 2^k, through floating point limbs, but for the thinnest ones.

CUDA has no int64 matrix product, and the CPU's is several times slower than three or six products of float64. Cutting integers
into limbs whose products float64 sums exactly is folklore of exact linear algebra (Dumas, Giorgi, Pernet: FFLAS, 2008);
CrypTen has it for GPUs with three or four unsigned limbs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.memo import constant
from protocols.ring import array, blank, known

WIDEST = 22  # bits of a limb: a 64-bit element is three of them
BLOCK = 1 << 18  # elements that are cut at a time: what the CPU's cache holds, and no new memory for each
DEVICE_BLOCK = 1 << 26
NARROWEST = 128  # columns of a block
MEASURED = 128  # inner dimension and columns of the products that tell which way is faster here
MEASURED_ROWS = (8, 32, 128)  # their rows: to cut the right operand costs the same for few rows as for many
NARROW = 32  # bits up to which a right operand may be held in int32
FEW = 6  # rows below which an int64 product on the CPU is faster than cutting the right operand


def limbs_of(bits: int) -> tuple[int, int, int]:
    """(number, width, terms): how an element of Z_2^bits is cut, and how many products of two limbs float64 sums exactly."""
    number = -(-bits // WIDEST)
    width = -(-bits // number)
    return number, width, 1 << (55 - 2 * width)


def _offset(bits: int) -> int:
    """What is added so that unsigned digits become limbs: half of a digit's range at every digit."""
    number, width, _ = limbs_of(bits)
    total = sum(1 << (width * i + width - 1) for i in range(number - 1)) + (1 << (bits - 1))
    return total - (1 << 64) if total >= 1 << 63 else total


def _cut(x: Tensor, bits: int, limb: int, out: Tensor) -> Tensor:
    """Writes one limb of every element of x to `out`, float64: x = sum_i limb_i 2^(b i) modulo 2^bits, |limb_i| <= 2^(b-1)."""
    number, width, _ = limbs_of(bits)
    own = bits - width * limb if limb == number - 1 else width
    digit = (x.to(torch.int64) + _offset(bits)).bitwise_right_shift_(width * limb).bitwise_and_((1 << own) - 1)
    return out.copy_(digit).sub_(float(1 << (own - 1)))


def limb_product(x: Tensor, y: Tensor, bits: int, small: bool = False) -> Tensor:
    """x @ y modulo 2^bits through float64: x (..., n, d), y (..., d, m), int64 -> (..., n, m), upper bits arbitrary.

    Steps: both are cut into L balanced limbs of b bits, L = ceil(bits / 22), b = ceil(bits / L); x y = sum_ij 2^(b (i + j)) x_i y_j,
    and what has i + j >= L is a multiple of 2^bits (b L >= bits), so that L (L + 1) / 2 products of limbs are left. For each
    j one float64 product takes all x_i, one below the other; the results are shifted and added in int64. The inner
    dimension is passed over in pieces of at most 2^(55 - 2 b) terms; y is cut block by block, and never whole.

    Exact, proof: (1) *The cut.* Let w_i be the width of digit i: b, of the last one bits - b (L - 1) <= b. With z = x + sum_i
    2^(b i + w_i - 1) modulo 2^bits and its digits 0 <= z_i < 2^(w_i), x = sum_i (z_i - 2^(w_i - 1)) 2^(b i) modulo 2^bits: the limbs are
    x_i = z_i - 2^(w_i - 1), |x_i| <= 2^(b-1). The sum is modulo 2^64, of which 2^bits is a divisor, and a digit's mask drops what the
    arithmetic shift brings in from the left. (2) *The float product.* A limb has at most 22 bits, so that its conversion is exact.
    |x_i y_j| <= 2^(2b-2), and 2^(55-2b) of them add up to at most 2^53 in absolute value. So does every partial sum over any subset
    of the terms, in any order, block-wise or with fused multiply-adds. Partial sums are integers, float64 holds all integers of
    [-2^53, 2^53], and an IEEE 754 operation whose exact result is representable returns it: no rounding happens. (Algorithms
    like Strassen's form other sums; BLAS and cuBLAS use none for float64. The emulated float64 that newer cuBLAS offers must
    stay off.) (3) *The sum.* The conversion to int64 is exact; shifts and additions are modulo 2^64, of which 2^bits is a divisor.

    `small`: every entry of y, as the int64 that it is, lies in [-2^21, 2^21), so that y is one limb and L products are left. Exact as
    above: |x_i y| <= 2^(b-1+21), and the pieces have 2^(33-b) terms.

    Terms a piece: 2048 for b = 22 (rings of 22, 43, 44 and 64 bits), 32768 for b = 20, 2^21 for b = 17.
    """
    number, width, terms = limbs_of(bits)
    terms = 1 << (33 - width) if small else terms
    rows, inner, columns = *x.shape[-2:], y.shape[-1]
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    total = x.new_zeros((*batch, rows, columns))
    block = BLOCK if x.device.type == "cpu" else DEVICE_BLOCK
    terms = min(terms, max(1, inner), block // NARROWEST)
    step = max(NARROWEST, block // (terms * max(1, math.prod(y.shape[:-2]))))
    for start in range(0, inner, terms):
        left = x[..., start : start + terms]
        tall = x.new_empty((*left.shape[:-2], number * rows, left.shape[-1]), dtype=torch.float64)  # the x_i, one below the other
        for i in range(number):
            _cut(left, bits, i, tall[..., i * rows : (i + 1) * rows, :])
        for at in range(0, columns, step):
            part = y[..., start : start + terms, at : at + step]
            right = torch.empty_like(part, dtype=torch.float64)
            for j in range(1 if small else number):
                limb = right.copy_(part) if small else _cut(part, bits, j, right)
                products = torch.matmul(tall[..., : (number - j) * rows, :], limb)  # (..., (L - j) n, columns)
                for i in range(number - j):
                    shifted = products[..., i * rows : (i + 1) * rows, :].to(torch.int64).bitwise_left_shift_(width * (i + j))
                    total[..., at : at + step].add_(shifted)
    return total


def product_held(batch: int, rows: int, inner: int, columns: int) -> int:
    """Elements that `matmul` holds at a time for `batch` products, its operands aside: the result, and on the CPU limbs and blocks."""
    terms = min(inner, BLOCK // NARROWEST)
    left, right = 4 * batch * rows * terms, 3 * min(batch * inner * columns, max(BLOCK, NARROWEST * terms * batch))
    return left + right + 8 * batch * rows * columns


def _compiled(x: Tensor, y: Tensor, transposed: bool = False) -> Tensor:
    """x @ y by a compiled loop, x (..., n, d) and y (..., d, m), or (..., m, d) if it is to be transposed.

    Modulo 2^64; modulo 2^32 where y is int32, as which x is then taken too.
    """
    if not y.is_contiguous() and y.transpose(-1, -2).is_contiguous():
        y, transposed = y.transpose(-1, -2), not transposed
    rows, columns = x.shape[-2], y.shape[-2 if transposed else -1]
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x = x.to(y.dtype)
    out = x.new_empty((*batch, rows, columns))
    left, right = (z.expand(*batch, *z.shape[-2:]).reshape(math.prod(batch), *z.shape[-2:]).contiguous() for z in (x, y))
    product = kernels.fast.product_transposed if transposed else kernels.fast.product
    product(array(left), array(right), array(out.view(math.prod(batch), rows, columns)))
    return out.to(torch.int64)


def _directly(x: Tensor, rows: int, dtype: torch.dtype, small: bool) -> bool:
    """Whether an integer product is to be used, torch's or a compiled one: of few rows, or of so many where that is faster here."""
    if not x.is_cpu or rows < FEW:
        return x.is_cpu
    return kernels.fast is not None and _direct_is_faster(dtype, min(MEASURED_ROWS, key=lambda each: abs(math.log(each / rows))), small)


@constant()
def _direct_is_faster(dtype: torch.dtype, rows: int, small: bool) -> bool:
    """Whether the compiled product of such operands outruns float64 limbs on this processor: measured once, in a few milliseconds.

    It does where there are vectors of 64-bit products (AVX-512's), on one core against one, and elsewhere for few rows or an operand of
    several limbs; where torch has many threads, limbs may win.
    """
    x = torch.arange(rows * MEASURED).reshape(rows, MEASURED) * (0x9E3779B97F4A7C15 - (1 << 64))
    y = (torch.arange(MEASURED**2) * 3).reshape(MEASURED, MEASURED).to(dtype)
    bits = 44 if dtype is torch.int64 else NARROW

    def seconds(product: Callable[[], Tensor]) -> float:
        found = []
        for _ in range(3):
            began = time.perf_counter()
            product()
            found.append(time.perf_counter() - began)
        return min(found)

    return seconds(lambda: _compiled(x, y)) < seconds(lambda: limb_product(x, y, bits, small))


def matmul(x: Tensor, y: Tensor, bits: int = 64, small: bool = False) -> Tensor:
    """x @ y modulo 2^bits; x (..., n, d) or (d,), y (..., d, m); a blank where one is not known.

    `small`: see `limb_product`. y may be int32, if bits are at most 32.
    """
    if not known(x, y):
        return blank(*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), *x.shape[-2:-1], y.shape[-1])
    flat = y.dim() == 2 and x.dim() != 2  # one product of all rows
    left = x.reshape(-1, x.shape[-1]) if flat else x
    assert y.dtype is torch.int64 or bits <= NARROW, f"{bits} bits of a right operand of {NARROW}"
    if _directly(x, left.shape[-2], y.dtype, small):
        product = _compiled(left, y) if kernels.fast is not None else (left.to(y.dtype) @ y).to(torch.int64)
    else:
        product = limb_product(left, y, bits, small)
    return product.reshape(*x.shape[:-1], y.shape[-1]) if flat else product


def matmul_transposed(x: Tensor, w: Tensor, bits: int = 64, small: bool = False) -> Tensor:
    """x @ w.T modulo 2^bits; x (..., n), w (m, n). A large table is never copied into the other order."""
    flat = x.reshape(-1, x.shape[-1]) if known(x) else x
    if not known(x, w) or not _directly(x, len(flat), w.dtype, small):
        return matmul(x, w.T, bits, small)
    assert w.dtype is torch.int64 or bits <= NARROW, f"{bits} bits of a right operand of {NARROW}"
    if kernels.fast is not None:
        product = _compiled(flat, w, transposed=True)
    else:
        flat = flat.to(w.dtype)
        product = (torch.mv(w, flat[0])[None] if len(flat) == 1 else (w @ flat.T).T).to(torch.int64)
    return product.reshape(*x.shape[:-1], w.shape[0])
