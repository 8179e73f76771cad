"""Products by oblivious transfer, which are cheaper than ciphertexts where there are few.

Source: Gilboa, Two Party RSA Key Generation, CRYPTO 1999.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from torch import Tensor

from protocols import security
from protocols.correlations import Role
from protocols.ring import blank, known, reduce
from protocols.rounds import Protocol_


class Products(Protocol):
    """What is asked of `protocols.ot.transfers.Transfers`."""

    def trace(self) -> Products:
        """An end that is traced."""

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        """Shares of choice * delta."""

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int) -> Protocol_[Tensor]:
        """Shares of x * y modulo 2^bits, x at the sender, 0 <= y < 2^y_bits at the receiver."""


def product_shape(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Of left @ right; both have at least two axes."""
    return (*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])


def transfer_bytes(count: int) -> int:
    """About what so many correlated transfers take to make: 16 bytes each of the first, a quarter of one each of the others."""
    first = min(count, security.SMALL_IN_ALL)
    return 16 * first + (count - first) // 4


def product_bytes(count: int, bits: int) -> int:
    """About what `count` products in Z_2^bits take: for each bit a transfer, a choice, and a payload that shrinks."""
    return transfer_bytes(count * bits) + count * bits * (1 + (bits + 1) // 2) // 8


def matmul(transfers: Products, holder: Role, left: Tensor, right: Tensor, bits: int) -> Protocol_[Tensor]:
    """Shares of left @ right modulo 2^bits, one product of two elements at a time; `holder` has right and chooses.

    Rounds and leaks are those of `transfers.product`.
    """
    shape = product_shape(left, right)
    n, d, m = left.shape[-2], left.shape[-1], right.shape[-1]
    # (..., n, d, m), both
    full = (*shape[:-2], n, d, m)
    if not math.prod(full):
        return blank(*shape) if not known(left) and not known(right) else (left if known(left) else right).new_zeros(shape)
    x = left.unsqueeze(-1).expand(full).reshape(-1) if known(left) else blank(math.prod(full))
    y = reduce(right, bits).unsqueeze(-3).expand(full).reshape(-1) if known(right) else blank(math.prod(full))
    sender = Role.CLIENT if holder is Role.SERVER else Role.SERVER
    shares = yield from transfers.product(sender, x, y, bits, bits)
    return reduce(shares.reshape(full).sum(-2), bits) if known(shares) else blank(*shape)
