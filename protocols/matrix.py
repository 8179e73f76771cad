"""Matrix products modulo 2^k: torch's own where a device multiplies int64 matrices, by floating point limbs where not.

CUDA has no int64 matrix product, but a fast float64 one. Cutting integers into limbs whose products float64 sums exactly is
folklore of exact linear algebra (Dumas, Giorgi, Pernet: FFLAS, 2008); CrypTen has it for GPUs with three or four unsigned limbs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protocols.ring import blank, known, signed

WIDEST = 22  # bits of a limb: a 64-bit element is three of them


def limbs_of(bits: int) -> tuple[int, int, int]:
    """(number, width, terms): how an element of Z_2^bits is cut, and how many products of two limbs float64 sums exactly."""
    number = -(-bits // WIDEST)
    width = -(-bits // number)
    return number, width, 1 << (55 - 2 * width)


def _cut(x: Tensor, bits: int, width: int) -> list[Tensor]:
    """Limbs of x modulo 2^bits as float64, lowest first: x = sum_i limb_i 2^(width i), -2^(width-1) <= limb_i < 2^(width-1)."""
    out = []
    while bits > width:
        low = signed(x, width)
        out.append(low.double())
        x, bits = (x - low) >> width, bits - width
    return [*out, signed(x, bits).double()]


def limb_product(x: Tensor, y: Tensor, bits: int) -> Tensor:
    """x @ y modulo 2^bits through float64: x (..., n, d), y (..., d, m), int64 -> (..., n, m), upper bits arbitrary.

    Steps: both are cut into L balanced limbs of b bits, L = ceil(bits / 22), b = ceil(bits / L); x y = sum_ij 2^(b (i + j)) x_i y_j,
    and what has i + j >= L is a multiple of 2^bits (b L >= bits), so that L (L + 1) / 2 products of limbs are left. For each
    j one float64 product takes all x_i, one below the other; the results are shifted and added in int64. The inner
    dimension is passed over in pieces of at most 2^(55 - 2 b) terms.

    Exact, proof: (1) *The cut.* low = x mod 2^b as a number of [-2^(b-1), 2^(b-1)). x - low, computed modulo 2^64, is a multiple
    of 2^b, and the arithmetic shift of its representative is right modulo 2^(64-b), hence modulo 2^(bits-b): all that is read
    of it afterwards. The last limb has bits - b (L - 1) <= b bits and is made signed too; so x = sum_i x_i 2^(b i) modulo 2^bits
    with |x_i| <= 2^(b-1). (2) *The float product.* A limb has at most 22 bits, so that its conversion is exact. |x_i y_j| <=
    2^(2b-2), and 2^(55-2b) of them add up to at most 2^53 in absolute value. So does every partial sum over any subset of the
    terms, in any order, block-wise or with fused multiply-adds. Partial sums are integers, float64 holds all integers of
    [-2^53, 2^53], and an IEEE 754 operation whose exact result is representable returns it: no rounding happens. (Algorithms
    like Strassen's form other sums; BLAS and cuBLAS use none for float64. The emulated float64 that newer cuBLAS offers must
    stay off.) (3) *The sum.* The conversion to int64 is exact; shifts and additions are modulo 2^64, of which 2^bits is a divisor.

    Terms a piece: 2048 for b = 22 (rings of 22, 43, 44 and 64 bits), 32768 for b = 20, 2^21 for b = 17.
    """
    number, width, terms = limbs_of(bits)
    rows = x.shape[-2]
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    total = x.new_zeros((*batch, rows, y.shape[-1]))
    for start in range(0, x.shape[-1], terms):
        tall = torch.cat(_cut(x[..., start : start + terms], bits, width), -2)  # (..., L n, terms)
        for j, right in enumerate(_cut(y[..., start : start + terms, :], bits, width)):
            products = torch.matmul(tall[..., : (number - j) * rows, :], right)  # (..., (L - j) n, m)
            for i in range(number - j):
                total += products[..., i * rows : (i + 1) * rows, :].to(torch.int64) << (width * (i + j))
    return total


def multiplies_integers(device: torch.device) -> bool:
    """Whether torch has int64 matrix products there."""
    return device.type == "cpu"


def matmul(x: Tensor, y: Tensor, bits: int = 64) -> Tensor:
    """x @ y modulo 2^bits; x (..., n, d) or (d,), y (..., d, m); a blank where one is not known."""
    if not known(x, y):
        return blank(*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), *x.shape[-2:-1], y.shape[-1])
    if multiplies_integers(x.device):
        return x @ y
    if y.dim() == 2:  # one product of all rows
        return limb_product(x.reshape(-1, x.shape[-1]), y, bits).reshape(*x.shape[:-1], y.shape[-1])
    return limb_product(x, y, bits)


def matmul_transposed(x: Tensor, w: Tensor, bits: int = 64) -> Tensor:
    """x @ w.T modulo 2^bits; x (..., n), w (m, n). A large table is never copied into the other order."""
    if not known(x, w) or not multiplies_integers(x.device):
        return matmul(x, w.T, bits)
    flat = x.reshape(-1, x.shape[-1])
    product = torch.mv(w, flat[0])[None] if len(flat) == 1 else (w @ flat.T).T
    return product.reshape(*x.shape[:-1], w.shape[0])
