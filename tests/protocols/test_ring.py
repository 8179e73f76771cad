"""Ring arithmetic and packing against Python's integers, in every width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.linear import Weight, masked_weight, weight_mask
from protocols.ring import (
    BLOCK,
    add,
    blank,
    common_shape,
    decode,
    encode,
    multiply,
    pack,
    packed_size,
    parity,
    reduce,
    shift_right,
    signed,
    subtract,
    unpack,
)
from tests.support.two_party import mask_weight

WIDTHS = range(1, 65)
words = st.integers(-(2**63), 2**63 - 1)
widths = st.integers(1, 64)
EDGES = [0, 1, -1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 0x5555555555555555, -0x5555555555555556]


def tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def unsigned(x: torch.Tensor) -> list[int]:
    return [value % 2**64 for value in x.reshape(-1).tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
def test_representatives(bits: int) -> None:
    values = [*EDGES, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)), *(2**k - 1 for k in range(64))]
    x = tensor(values)
    assert unsigned(reduce(x, bits)) == [value % 2**bits for value in values]
    half = 2 ** (bits - 1)
    assert signed(x, bits).tolist() == [(value + half) % 2**bits - half for value in values]
    for shift in {0, 1, bits // 2, bits - 1} - {bits}:
        assert unsigned(shift_right(x, shift, bits)) == [value % 2**bits >> shift for value in values]


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_and_unpack_in_every_width(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for shape in ((0,), (1,), (7,), (8,), (3, 5), (2, 3, 11)):
        x = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
        data = pack(x, bits)
        assert data.dtype == np.uint8 and data.size == packed_size(x.numel(), bits)
        assert torch.equal(unpack(memoryview(data.tobytes()), shape, bits), reduce(x, bits))


@given(st.lists(words, max_size=40), widths)
def test_packing_is_as_documented(values: list[int], bits: int) -> None:
    data, count, whole = pack(tensor(values), bits).tobytes(), len(values), bits // 8
    want, at = b"", 0
    for size in (8, 4, 2, 1):
        if whole & size:
            want += b"".join((value % 2**64).to_bytes(8, "little")[at : at + size] for value in values)
            at += size
    for plane in range(8 * whole, bits):
        word = sum((value >> plane & 1) << k for k, value in enumerate(values))
        want += word.to_bytes(-(-count // 8), "little")
    assert data == want and len(data) == count * whole + (bits % 8) * -(-count // 8)


@given(st.lists(words, min_size=1, max_size=20), widths, words)
def test_bits_above_the_ring_change_nothing(values: list[int], bits: int, other: int) -> None:
    x = tensor(values)
    y = x + (torch.full_like(x, other) << bits if bits < 64 else 0)
    assert pack(x, bits).tobytes() == pack(y, bits).tobytes()
    assert torch.equal(signed(x, bits), signed(y, bits))
    for shift in range(0, bits, 7):
        assert torch.equal(shift_right(x, shift, bits), shift_right(y, shift, bits))


@given(st.lists(st.tuples(words, words), min_size=1, max_size=20), widths)
def test_sums_and_products_reduce_late(pairs: list[tuple[int, int]], bits: int) -> None:
    a, b = tensor([p for p, _ in pairs]), tensor([q for _, q in pairs])
    for computed, exact in (
        (add(a, b), [p + q for p, q in pairs]),
        (subtract(a, b), [p - q for p, q in pairs]),
        (multiply(a, b), [p * q for p, q in pairs]),
        (multiply(a, 12345), [p * 12345 for p, _ in pairs]),
    ):
        assert unsigned(reduce(computed, bits)) == [value % 2**bits for value in exact]


@given(st.lists(words, min_size=1, max_size=20), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_parity(values: list[int], width: int) -> None:
    assert parity(tensor(values), width).tolist() == [(value % 2**width).bit_count() % 2 for value in values]


@given(st.lists(st.floats(-(2.0**20), 2.0**20), min_size=1, max_size=20), st.integers(0, 30))
def test_encode_rounds_to_nearest(values: list[float], frac: int) -> None:
    x = encode(torch.tensor(values, dtype=torch.float64), frac)
    assert x.tolist() == [round(value * 2**frac) for value in values]  # both round halves to even
    back = decode(x, 53, frac)
    assert (back - torch.tensor(values, dtype=torch.float64)).abs().max() <= 2.0 ** -(frac + 1)


@settings(max_examples=30)
@given(widths, st.integers(0, 40))
def test_decode_reads_the_sign(bits: int, frac: int) -> None:
    half = 2 ** (bits - 1)
    edge = tensor([half - 1, -half, -1])
    assert decode(edge, bits, frac).tolist() == [float(v) / 2**frac for v in (half - 1, -half, -1)]


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_blanks_have_the_shape_of_the_sum(shape: list[int], data: st.DataObject) -> None:
    other = [data.draw(st.sampled_from([1, size])) for size in shape][data.draw(st.integers(0, len(shape))) :]
    want = torch.broadcast_shapes(shape, other)
    a, b = torch.zeros(shape, dtype=torch.int64), torch.zeros(other, dtype=torch.int64)
    assert common_shape(a, b) == tuple(want) == common_shape(b, a)
    for combine in (add, subtract, multiply):
        assert combine(a, blank(*other)).shape == want and combine(blank(*shape), b).is_meta


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("bits", [1, 21, 36, 60, 64])
def test_packing_goes_on_across_blocks(count: int, bits: int) -> None:
    x = torch.randint(-(2**63), 2**63 - 1, (count,))
    packed = pack(x, bits)
    assert len(packed) == packed_size(count, bits)
    assert torch.equal(unpack(packed.data, (count,), bits), reduce(x, bits))


@pytest.mark.parametrize("bits", [1, 8, 16, 29, 32, 33, 56, 64])
def test_a_masked_weight_is_packed_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of the whole, of a keystream that goes on from piece to piece; held in half the memory where its ring allows."""
    weight, seed = Weight("w", (37, 41), bits, 3), bytes(range(16))
    encoded = torch.randint(-(2**20), 2**20, weight.shape).to(weight.dtype)
    whole = weight_mask(seed, weight)
    want = pack(mask_weight(encoded, seed, weight), bits).tobytes()
    monkeypatch.setattr("protocols.linear.BLOCK", 64)
    assert torch.equal(weight_mask(seed, weight), whole) and whole.dtype == (torch.int32 if bits <= 32 else torch.int64)
    assert bytes(masked_weight(encoded, seed, weight)) == want
    assert torch.equal(unpack(memoryview(want), weight.shape, bits), reduce(encoded + whole.to(torch.int64), bits))
