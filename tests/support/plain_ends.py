"""A hook that makes a process's two-party source an insecure and quick one: transfers and products in the clear, weights sent as they are.

For tests of what stands around the source. Sizes, rounds and prediction are those of the insecure twins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from torch import Tensor

from privinf.lowering import encrypted, joint
from protocols.lattice.weights import Form
from protocols.ring import pack, packed_size, unpack
from protocols.rounds import Protocol_
from tests.support.plain_lattice import PlainLattice
from tests.support.plain_transfers import PlainTransfers

PIECE = 4096


class _Lattice(PlainLattice):
    """Takes a weight in its forms."""

    def linear(self, weight: Any, r: Tensor, out: int, bits: int, *, transposed: bool = False) -> Protocol_[Tensor]:
        return super().linear(_of(weight, r.shape[-1], out, bits, transposed, False), r, out, bits, transposed=transposed)

    def lookup(self, table: Any, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        return super().lookup(_of(table, size, out, bits, False, True), ids, out, bits, size)


def _of(weight: Any, *form: Any) -> Any:
    """The weight of a form."""
    return weight[Form(next(iter(weight)).name, *form)] if isinstance(weight, dict) else weight


def _sizes(form: Form) -> Iterator[int]:
    """Of the pieces of a weight that is sent as it is."""
    size = packed_size(form.inner * form.outer, form.bits)
    yield from (min(PIECE, size - start) for start in range(0, size, PIECE))


def _encrypt(keys: Any, form: Form, encoded: Tensor) -> Iterator[bytes]:
    data, at = pack(encoded, form.bits).tobytes(), 0
    for size in _sizes(form):
        yield data[at : at + size]
        at += size


class _Weight:
    @staticmethod
    def read(form: Form, parts: Iterable[memoryview], stored: Any = None) -> Tensor:
        shape = (form.outer, form.inner) if form.transposed else (form.inner, form.outer)
        return unpack(memoryview(b"".join(parts)), shape, form.bits)


PLAIN: dict[tuple[Any, str], Any] = {
    (joint, "Transfers"): PlainTransfers,
    (joint, "Lattice"): _Lattice,
    (Form, "part_sizes"): _sizes,
    (encrypted, "encrypt_weight"): _encrypt,
    (encrypted, "EncryptedWeight"): _Weight,
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
        patch.setattr(encrypted, "_known", WeakKeyDictionary())  # what is known of models' weights is of other ends
        yield
