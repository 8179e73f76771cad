"""Matrix products by limbs, bit for bit against torch's int64 product and against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols import matrix
from protocols.kernels import plain
from protocols.matrix import WIDEST, limb_product, limbs_of, matmul, matmul_transposed
from protocols.ring import blank, reduce, signed

WIDTHS = range(1, 65)
HOSTILE = [0, 1, -1, 2**63 - 1, -(2**63), -(2**62), 2**21, -(2**21), 2**21 - 1, 0x5555555555555555, -0x5555555555555556]
widths = st.integers(1, 64)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Half uniform, half values that sit at the edges of limbs and words."""
    x = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    edge = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), shape, generator=generator)]
    return torch.where(torch.randint(2, shape, generator=generator).bool(), x, edge)


def extreme(bits: int) -> int:
    """The element of Z_2^bits all of whose limbs are as large as can be in absolute value: -2^(b-1), or what the last one has."""
    number, width, _ = limbs_of(bits)
    own = [width] * (number - 1) + [bits - width * (number - 1)]
    total = sum(-(1 << (each - 1)) << (width * i) for i, each in enumerate(own))
    return total % (1 << bits)


def as_word(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_bound_of_the_proof(bits: int) -> None:
    number, width, terms = limbs_of(bits)
    assert number * width >= bits > (number - 1) * width and width <= WIDEST
    assert terms * 2 ** (2 * width - 2) <= 2**53 < (terms + 1) * 2 ** (2 * width - 2)


@settings(deadline=None, max_examples=150)
@given(
    bits=widths,
    batch=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, 7, 64]), st.integers(0, 5)),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_against_torch(bits: int, batch: list[int], sizes: tuple[int, int, int], transposed: bool, seed: int) -> None:
    generator, (n, d, m) = torch.Generator().manual_seed(seed), sizes
    x = random(generator, *batch, n, d)
    y = random(generator, *batch, m, d).transpose(-1, -2) if transposed else random(generator, *batch, d, m)
    assert torch.equal(reduce(limb_product(x, y, bits), bits), reduce(x @ y, bits))


@settings(deadline=None, max_examples=12)
@given(bits=widths, inner=st.integers(2000, 9000), seed=st.integers(0, 2**32))
def test_long_inner_dimensions(bits: int, inner: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = random(generator, 2, 3, inner), random(generator, 2, inner, 4)
    assert torch.equal(reduce(limb_product(x, y, bits), bits), reduce(x @ y, bits))


@pytest.mark.parametrize("bits", [1, 21, 22, 23, 44, 45, 63, 64])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_many_blocks(bits: int, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 terms and blocks of 4 columns."""
    monkeypatch.setattr(matrix, "BLOCK", 64)
    monkeypatch.setattr(matrix, "NARROWEST", 4)
    generator = torch.Generator().manual_seed(bits)
    x, y = random(generator, *batch, 7, 50), random(generator, *batch, 37, 50).transpose(-1, -2)
    assert torch.equal(reduce(limb_product(x, y, bits), bits), reduce(x @ y, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_where_every_sum_is_as_large_as_can_be(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All limbs of all elements at -2^(b-1), as many terms as a piece takes (up to 2^13), one less and one more; by Python's integers."""
    worst, terms = as_word(extreme(bits)), min(limbs_of(bits)[2], 1 << 13)
    monkeypatch.setattr(matrix, "BLOCK", 1 << 20)  # pieces as long as the bound allows
    for inner in (1, terms - 1, terms, terms + 1):
        x, y = torch.full((2, inner), worst), torch.full((inner, 1), worst)
        assert reduce(limb_product(x, y, bits), bits).tolist() == [[as_word(inner * worst * worst % 2**bits)]] * 2


def test_longer_pieces_would_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pieces are for, and that these tests would see it."""
    x = torch.full((1, 1 << 14), as_word(extreme(44)))
    y = x.T.clone()
    x[0, -1] = y[-1, 0] = 1  # an odd sum
    exact = reduce(x @ y, 44)
    assert torch.equal(reduce(limb_product(x, y, 44), 44), exact)
    monkeypatch.setattr(matrix, "limbs_of", lambda bits: (2, 22, 1 << 14))
    monkeypatch.setattr(matrix, "BLOCK", 1 << 21)
    assert not torch.equal(reduce(limb_product(x, y, 44), 44), exact)


def test_broadcasting_and_single_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = random(generator, 2, 3, 4, 6), random(generator, 3, 6, 5)
    assert torch.equal(limb_product(x, y, 64), x @ y)
    row, table = random(generator, 6), random(generator, 7, 6)
    assert torch.equal(matmul(row, table.T), row @ table.T)
    assert torch.equal(matmul_transposed(x, table), x @ table.T)
    assert torch.equal(matmul_transposed(x[:1, :1, :1], table), x[:1, :1, :1] @ table.T)
    assert signed(limb_product(x, table.T, 20), 20).equal(signed(x @ table.T, 20))


@pytest.mark.parametrize(
    ("left", "right"), [((4, 6), (6, 5)), ((6,), (6, 5)), ((2, 4, 6), (6, 5)), ((2, 4, 6), (2, 6, 5)), ((4, 6), (3, 6, 5))]
)
def test_shapes_of_what_is_not_known(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = torch.ones(left, dtype=torch.int64), torch.ones(right, dtype=torch.int64)
    shape = (x @ y).shape
    assert matmul(blank(*left), y).shape == matmul(x, blank(*right)).shape == matmul(x, y).shape == shape


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bits", [1, 16, 22, 23, 32])
def test_a_right_operand_in_half_the_memory(bits: int, rows: int) -> None:
    """int32, its upper bits arbitrary, by limbs and by torch's product."""
    generator = torch.Generator().manual_seed(bits)
    x, y = random(generator, rows, 300), random(generator, 300, 40)
    narrow, want = y.to(torch.int32), reduce(x @ y, bits)
    with plain():
        for found in (matmul(x, narrow, bits), limb_product(x, narrow, bits), matmul_transposed(x, narrow.T.contiguous(), bits)):
            assert found.dtype is torch.int64 and torch.equal(reduce(found, bits), want)
    with pytest.raises(AssertionError, match="33 bits"):
        matmul(x, narrow, 33)


@pytest.mark.parametrize("bits", [1, 7, 16, 22, 23, 32, 44, 45, 56, 63, 64])
def test_a_right_operand_of_one_limb(bits: int) -> None:
    """At its edges, and over more terms than one piece has."""
    generator = torch.Generator().manual_seed(bits)
    x = random(generator, 5, 5000)
    y = torch.randint(-(2**21), 2**21, (5000, 7), generator=generator)
    y[:, 0], y[:, 1] = -(2**21), 2**21 - 1
    x[0] = as_word(extreme(bits))
    assert torch.equal(reduce(limb_product(x, y, bits, small=True), bits), reduce(x @ y, bits))
    assert torch.equal(reduce(matmul_transposed(x, y.T.contiguous(), bits, small=True), bits), reduce(x @ y, bits))
