"""A hook that makes a process's two-party source an insecure and quick one: transfers and products in the clear, weights sent as they are.

For tests of what stands around the source. Sizes, rounds and prediction are those of the insecure twins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from privinf.lowering import encrypted, joint
from protocols.linear import Weight
from protocols.ring import pack, packed_size, unpack
from tests.support.plain_lattice import PlainLattice
from tests.support.plain_transfers import PlainTransfers


def _size(weight: Weight, bits: int, transposed: bool) -> int:
    return packed_size(weight.shape[0] * weight.shape[1], weight.bits)


def _encrypt(seed: bytes, weight: Weight, encoded: Tensor, bits: int, transposed: bool) -> memoryview:
    return pack(encoded, weight.bits).data


def _read(data: memoryview, weight: Weight, bits: int, transposed: bool) -> Any:
    return unpack(data, weight.shape, weight.bits)


PLAIN = {
    (joint, "Transfers"): PlainTransfers,
    (joint, "Lattice"): PlainLattice,
    (encrypted, "encrypted_size"): _size,
    (encrypted, "encrypt_weight"): _encrypt,
    (encrypted, "read_weight"): _read,
}


@dataclass(frozen=True)
class PlainEnds:
    """For a process; see the module's text."""

    def __call__(self) -> None:
        for (module, name), value in PLAIN.items():
            setattr(module, name, value)


@contextmanager
def plain_ends() -> Iterator[None]:
    """For this process, until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in PLAIN.items():
            patch.setattr(module, name, value)
        yield
