"""Compiled loops against their plain twins, bit for bit, and what happens where there are none."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocols import kernels
from protocols.comparison import _joint, _joint_masks, _joint_products
from protocols.correlations import Kind, Mask, Part, Role, pack_parts
from protocols.kernels import build
from protocols.matrix import matmul, matmul_transposed
from protocols.prg import Prg
from protocols.ring import pack, packed_size, reduce, unpack
from protocols.rows import Rows
from protocols.sequences import mixed, scored
from protocols.sources.base import PartySource
from protocols.sources.dealer import Store
from protocols.truncation import OrMask

WIDTHS = [1, 2, 7, 8, 9, 16, 21, 24, 33, 36, 40, 54, 56, 63, 64]
COUNTS = [0, 1, 7, 8, 9, 63, 513, 4096, 4103, 70001]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    kernels.load(None)
    assert kernels.status() == "compiled"


def elements(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape)


def both(function: Any) -> tuple[Any, Any]:
    """By compiled code, and by the twins."""
    assert kernels.fast is not None
    found = function()
    with kernels.plain():
        return found, function()


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing(bits: int) -> None:
    for count in COUNTS:
        x = elements(count)
        fast, plain = both(lambda x=x: pack(x, bits))
        assert fast.tobytes() == plain.tobytes() and fast.size == packed_size(count, bits)
        data = memoryview(plain.tobytes())
        fast, plain = both(lambda data=data, count=count: unpack(data, (count,), bits))
        assert torch.equal(fast, plain)


def test_packing_of_what_does_not_lie_in_order() -> None:
    x = elements(9, 34)
    for view in (x.T, x[:, ::3], x[2:5, 4:9], x[:0], x[0, ::2]):
        fast, plain = both(lambda view=view: pack(view, 21))
        assert fast.tobytes() == plain.tobytes()
        data = np.concatenate([np.zeros(1, np.uint8), plain])[1:]  # of an odd address, and writable
        assert torch.equal(*both(lambda data=data, view=view: unpack(data, tuple(view.shape), 21)))


def test_too_few_bytes_are_refused() -> None:
    assert kernels.fast is not None
    with pytest.raises(ValueError):
        unpack(memoryview(bytes(packed_size(100, 21) - 1)), (100,), 21)


@pytest.mark.parametrize("bits", WIDTHS)
def test_keystreams(bits: int) -> None:
    for counter in (0, 7, 2**63 - 1, 2**64 - 1):
        for count in (0, 1, 5, 4095, 4097):

            def draws(counter: int = counter, count: int = count) -> list[torch.Tensor]:
                stream = Prg(bytes(range(16))).stream(counter)
                return [stream.uniform((3,), 8), stream.uniform((count,), bits), stream.uniform((count, 2), 64)]  # at odd places

            for fast, plain in zip(*both(draws), strict=True):
                assert torch.equal(fast, plain)


class Several(Kind, frozen=True):
    """Parts of all widths, some shared by XOR."""

    count: int

    def server_parts(self) -> Any:
        return (Part((self.count, 2), 5), Part((self.count,), 33))

    client_parts = server_parts

    def shared_parts(self) -> Any:
        return tuple(Part((self.count,), bits, xor=True) for bits in WIDTHS)


del Kind.registry["Several"]  # no release has it

KINDS: list[Kind] = [Mask((3, 5), 21), Several(3), OrMask((0,), 7), Several(0), Mask((40, 500), 36), Several(33), Mask((4,), 64, 1)] * 9


@pytest.mark.parametrize("role", Role)
def test_correlations_that_are_expanded_together(role: Role) -> None:
    def taken() -> list[torch.Tensor]:
        store, found = Store(role, b"0123456789abcdef"), []
        generator = torch.Generator().manual_seed(1)
        store.begin_pass(KINDS)
        for name, kind in enumerate(KINDS, 1):
            parts = kind.shared_parts()
            if role is Role.CLIENT and parts:
                values = [torch.randint(-(2**63), 2**63 - 1, part.shape, generator=generator) for part in parts]
                store.put(name, memoryview(pack_parts(values, parts)))
        for kind in KINDS:
            correlation = store.take(kind)
            found += [*correlation.own, *correlation.shares]
        assert not store._ready and not store._payloads
        return found

    fast, plain = both(taken)
    assert len(fast) == len(plain)
    assert all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(fast, plain, strict=True))


def test_nothing_is_expanded_for_a_name_that_is_held() -> None:
    store = Store(Role.SERVER, b"0123456789abcdef")
    kinds = [Mask((2,), 8)] * 3
    store.begin_pass(kinds)
    held = PartySource.peek(store, kinds[1], 2)
    store.hold(held)
    found = [store.take(kind) for kind in kinds]
    assert found[1] is held and not torch.equal(found[0].own[0], found[2].own[0])
    store.end_pass()
    assert not store._ready


SIZES = [
    ((0, 3), (3, 2)),
    ((1, 0), (0, 5)),
    ((1, 7), (7, 3)),
    ((5, 257), (257, 1030)),
    ((3, 4, 9), (3, 9, 6)),
    ((2, 1, 4, 9), (3, 9, 6)),
    ((7,), (7, 5)),
]


@pytest.mark.parametrize(("left", "right"), SIZES)
def test_products(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = elements(*left), elements(*right)
    want = (x[..., :, None] * (y if x.dim() == 1 else y[..., None, :, :])).sum(-2)
    turned = y.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protocols.matrix._direct_is_faster", lambda *of: True)
        for each in (y, turned, torch.cat([y, y], -1)[..., : y.shape[-1]]):
            assert torch.equal(matmul(x, each), want)
            assert torch.equal(reduce(matmul(x, each.to(torch.int32), 32), 32), reduce(want, 32))
        if y.dim() == 2 and len(y):
            assert torch.equal(matmul_transposed(x, y.T.contiguous()), want)
            assert torch.equal(reduce(matmul_transposed(x, y.T.to(torch.int32).contiguous(), 32), 32), reduce(want, 32))


def test_products_of_sequences() -> None:
    """A row of each sequence with its own rows of what is cached, wherever they lie."""
    parts, starts = [Rows(5, 1, 1), Rows(1, 1, 1), Rows(9, 1, 1)], (9, 14, 0)
    q, k, p = elements(2, 3, 4), elements(2, 15, 4), elements(2, 15)
    found, twin = both(lambda: scored(q, k, starts, parts, 64))
    assert torch.equal(found, twin) and torch.equal(found[:, 5], (q[:, 1] * k[:, 14]).sum(-1))
    found, twin = both(lambda: mixed(p, k, starts, parts, 64))
    assert torch.equal(found, twin) and torch.equal(found[:, 1], p[:, 5:6] * k[:, 14])


def test_where_nothing_can_be_compiled_the_twins_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(directory: Path | None) -> None:
        raise OSError("Could not find or load libllvmlite.so")

    monkeypatch.setattr(build, "read", broken)
    with kernels.plain():
        kernels._prepare(None)
        assert kernels.fast is None
        assert kernels.status() == "plain: Numba does not load: OSError: Could not find or load libllvmlite.so"
        monkeypatch.setenv(kernels.OFF, "0")
        kernels._prepare(tmp_path)
        assert kernels.status() == "plain: switched off by PRIVINF_KERNELS=0" and not list(tmp_path.iterdir())


def test_what_others_can_write_to_is_not_read(tmp_path: Path) -> None:
    assert kernels._writable(tmp_path / "own") and kernels._trusted(tmp_path / "own")
    os.chmod(tmp_path / "own", 0o770)
    assert not kernels._trusted(tmp_path / "own") and not kernels._writable(tmp_path / "own")
    assert not kernels._trusted(tmp_path / "missing") and not kernels._writable(Path(os.devnull) / "below")


@pytest.mark.parametrize("number", range(2, 8))
def test_products_of_a_words_variables(number: int) -> None:
    """Each bit is the product of the variables that stand in `_joint`, in its order."""
    x, masks = torch.randint(0, 1 << 2 * (number - 1), (3, 211)), _joint_masks(number)
    x[0, :9] = (1 << 2 * (number - 1)) - 1
    bits = [
        bit
        for mask in masks
        for bit in both(lambda mask=mask: _joint_products(x, mask))[0][None] >> torch.arange(len(mask))[:, None, None] & 1
    ]
    assert all(torch.equal(*both(lambda mask=mask: _joint_products(x, mask))) for mask in masks)
    assert len(bits) == len(_joint(number)) == 3 * 2 ** (number - 1) - 2 * number - 1
    for bit, product in zip(bits, _joint(number), strict=True):
        assert torch.equal(bit, torch.stack([x >> variable & 1 for variable in product]).prod(0))
