"""Every protocol against its plaintext twin: exactly, or within the bound of its docstring, at the edges of its domain.

The exponential, the reciprocal, softmax and attention are in `test_protocols_softmax.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from protocols import reference
from protocols.comparison import MAX_BITS, BitMask, CompareMask, compare
from protocols.correlations import Role
from protocols.linear import Weight, linear, lookup, scale
from protocols.maximum import place_of, row_argmax, row_maximum, upper_wire
from protocols.opening import add_server_constant, open_masked, private_input, reveal, unmasked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, matmul_wires, multiply, scores, weighted
from protocols.ring import packed_size, reduce, signed
from protocols.rows import MAX_SINGLE, Rows, radices, single_digit, tournament
from protocols.shares import Shares, Wire
from protocols.truncation import reduces, rescale
from tests.support.two_party import element, input_of, offline_walk, run, uniform

ODD_RINGS = [1, 7, 13, 21, 33, 40, 47, 63, 64]
LAYOUTS = [Rows(1, 1, 0), Rows(1, 9, 1), Rows(12, 3, 1), Rows(5, 4, 0), Rows(1, 6, 0), Rows(3, 2, 7)]


# ---- linear


@pytest.mark.parametrize("bits", ODD_RINGS)
@pytest.mark.parametrize("early", [False, True])
def test_linear_is_exact(bits: int, early: bool) -> None:
    for shape, out in (((1, 1), 1), ((3, 5), 7), ((2, 4, 3), 2)):
        for transposed in (False, True):
            ring = min(64, bits + 5)
            w = Weight("w", (out, shape[-1]) if transposed else (shape[-1], out), ring, 2)
            x, encoded = uniform(*shape, bits=ring), uniform(*w.shape, bits=ring)

            def program(party: Party, x: Tensor = x, ring: int = ring, w: Weight = w, transposed: bool = transposed) -> Protocol_[Shares]:
                return (yield from linear(party, input_of(party, x, ring, 3, early=early), w, bits=bits, transposed=transposed))

            outcome = run(program, {"w": (w, encoded)})
            assert torch.equal(outcome.element(), reference.linear(x, encoded.T if transposed else encoded, bits))
            assert outcome.server.early and outcome.server.frac == 5 and outcome.server.bits == bits


@pytest.mark.parametrize("early", [(False, False), (True, False), (False, True), (True, True)])
def test_a_map_of_values_side_by_side_sends_each_as_soon_as_it_is_known(early: tuple[bool, bool]) -> None:
    w, x, y = Weight("w", (8, 2), 45, 2), uniform(3, 5, bits=41), uniform(3, 3, bits=43)
    encoded = uniform(8, 2, bits=45)

    def program(party: Party) -> Protocol_[Shares]:
        parts = [input_of(party, x, 41, 3, early=early[0]), input_of(party, y, 43, 3, early=early[1])]
        return (yield from linear(party, parts, w, bits=40))

    outcome = run(program, {"w": (w, encoded)})
    assert torch.equal(outcome.element(), reference.linear(torch.cat([x, y], -1), encoded, 40))
    sizes = [packed_size(value.numel(), 40) for value in (x, y)]
    late = sum(size for size, ahead in zip(sizes, early, strict=True) if not ahead)
    assert outcome.counted["online"]["payload"] == outcome.predicted.online_bytes == late
    assert outcome.predicted.peer_offline_bytes == sum(sizes) - late


@pytest.mark.parametrize("early", [False, True])
def test_scale_reads_a_window_of_its_weight(early: bool) -> None:
    w = Weight("w", (3, 10), 45, 9)
    x, encoded = uniform(3, 4, 5, bits=40), uniform(3, 10, bits=45)
    outcome = run(lambda p: scale(p, input_of(p, x, 40, 8, early=early), w, bits=39, window=(2, 6)), {"w": (w, encoded)})
    assert torch.equal(outcome.element(), reference.product(x, encoded[:, 2:6, None], 39))
    vector, single = Weight("v", (5,), 45, 9), uniform(5, bits=45)
    outcome = run(lambda p: scale(p, input_of(p, x, 40, 8, early=early), vector, bits=39), {"v": (vector, single)})
    assert torch.equal(outcome.element(), reference.product(x, single, 39))


@pytest.mark.parametrize(("vocabulary", "width", "bits"), [(1, 1, 7), (3, 2, 20), (257, 5, 15), (1009, 3, 64), (50257, 2, 20)])
def test_lookup(vocabulary: int, width: int, bits: int) -> None:
    table, encoded = Weight("t", (vocabulary, width), bits, 3), uniform(vocabulary, width, bits=bits)
    ids = torch.cat([torch.tensor([0, vocabulary - 1]), torch.randint(vocabulary, (3,))])

    def program(party: Party) -> Protocol_[Shares]:
        known = None if party.is_server or offline_walk(party) else ids
        return (yield from lookup(party, known, len(ids), table, bits=bits))

    assert torch.equal(run(program, {"t": (table, encoded)}).element(), reference.lookup(ids, encoded))


# ---- truncation


RESCALES = [
    (33, 12, 21),
    (36, 18, 18),
    (64, 20, 44),
    (40, 16, 40),
    (18, 0, 44),
    (64, 20, 64),
    (37, 3, 35),
    (7, 1, 7),
    (21, 5, 63),
    (64, 1, 64),
]


@pytest.mark.parametrize(("bits", "shift", "to_bits"), RESCALES)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_rescale(bits: int, shift: int, to_bits: int, early: bool, nonnegative: bool) -> None:
    low, high = (-(1 << bits - 5), (1 << bits - 1) - (1 << bits - 5) - 1) if nonnegative else (-(1 << bits - 2), (1 << bits - 2) - 1)
    if to_bits <= bits - shift:
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1  # any value
    edges = {low, high, low + 1, high - 1, 0, 1, -1, (1 << shift) - 1, -(1 << shift), (low + high) // 2}
    edge = torch.tensor([v for v in edges if low <= v <= high])
    # `low + uniform` without leaving int64
    inner = (low // 2 + torch.randint(0, max(1, (high - low) // 2), (20000,))) * 2 % (high - low + 1) + low if high - low < 2**62 else None
    x = torch.cat([edge.repeat(200), inner if inner is not None else torch.randint(low, high, (20000,))])
    assert x.min() >= low and x.max() <= high

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from rescale(party, input_of(party, x, bits, shift, early=early), bits=to_bits, frac=0, nonnegative=nonnegative))

    outcome = run(program)
    floor, above = reference.rescale(x, shift, to_bits)
    got = outcome.element()
    assert ((got == floor) | (got == above)).all()
    assert outcome.server.bits == to_bits and outcome.server.frac == 0
    if shift == 0:
        assert torch.equal(got, floor)
    elif shift >= 3:  # the roundings are centred: right on average, and both occur
        error = reduce(got - floor, to_bits).double() - reduce(x, shift).double() / 2.0**shift
        assert abs(error.mean() - 2.0**-shift) < 6 * 0.5 / len(x) ** 0.5
        assert (got == floor).any() and (got == above).any()


def test_rescale_keeps_what_is_known_early() -> None:
    x = uniform(50, bits=30)
    outcome = run(lambda p: rescale(p, input_of(p, x, 40, 12, early=True), bits=28, frac=0))
    assert outcome.server.early and outcome.client.early and reduces(Shares(x, 40, 12), 28, 0)
    assert outcome.predicted.online_bytes == outcome.predicted.peer_offline_bytes == 0


@pytest.mark.parametrize(("frac", "to_bits", "early"), [(9, 33, True), (9, 20, False), (14, 64, False)])
def test_rescale_to_more_fraction_bits(frac: int, to_bits: int, early: bool) -> None:
    """Exact, and local up to the ring that the added bits make: a multiple of 2^j is shared modulo 2^(k + j)."""
    x = torch.cat([torch.tensor([-(1 << 28), (1 << 28) - 1, 0, 1, -1]), uniform(500, bits=29)])
    outcome = run(lambda p: rescale(p, input_of(p, x, 30, 6, early=early), bits=to_bits, frac=frac))
    assert (outcome.server.bits, outcome.server.frac, outcome.client.early) == (to_bits, frac, early)
    assert torch.equal(outcome.element(), reference.wrap(x << (frac - 6), to_bits))
    assert (outcome.predicted.online_bytes == 0) == (to_bits <= 30 + frac - 6)


# ---- openings and products


@pytest.mark.parametrize("bits", ODD_RINGS)
def test_wires_inputs_and_revealing(bits: int) -> None:
    x, y = uniform(3, 5, bits=bits), uniform(2, bits=bits)

    def program(party: Party) -> Protocol_[Any]:
        own = input_of(party, y, bits, 0)
        mine = private_input(y if not own.value.is_meta else own.value, bits, 0, own=party.is_server)
        first, second, third = yield from open_masked(party, [input_of(party, x, bits, 0), input_of(party, y, bits, 0, early=True), mine])
        shifted = add_server_constant(party, own, y if party.is_server else None)
        seen = []
        for role in Role:
            seen.append((yield from reveal(party, unmasked(party, first), to=role)))
            seen.append((yield from reveal(party, shifted, to=role)))
        return first, second, third, seen

    outcome = run(program)
    for index, want in enumerate((x, y, y)):
        assert torch.equal(element(outcome.server[index], outcome.client[index]), want)
    for place, role in enumerate(Role):
        told, other = (outcome.server, outcome.client) if role is Role.SERVER else (outcome.client, outcome.server)
        assert torch.equal(told[3][2 * place], reduce(x, bits)) and torch.equal(told[3][2 * place + 1], reduce(2 * y, bits))
        assert other[3][2 * place] is None and other[3][2 * place + 1] is None


def test_shares_are_linear() -> None:
    x, y, k = uniform(2, 3, bits=30), uniform(2, 3, bits=30), torch.tensor([[3], [-5]])

    def program(party: Party) -> Protocol_[Shares]:
        yield from ()
        a, b = input_of(party, x, 30, 4), input_of(party, y, 33, 4)
        return (a + b - b.times(7) + (-a).times(k)).narrow(29).map(lambda v: v.sum(-1))

    assert torch.equal(run(program).element(), reference.wrap((x - 6 * y - k * x).sum(-1), 29))


@pytest.mark.parametrize("bits", ODD_RINGS)
def test_products_are_exact(bits: int) -> None:
    wide = min(64, bits + 3)
    for left, right in (((1,), (1,)), ((2, 3, 1), (1, 5)), ((7,), (4, 7))):
        x, y = uniform(*left, bits=wide), uniform(*right, bits=bits)

        def product(party: Party, x: Tensor = x, y: Tensor = y) -> Protocol_[Shares]:
            a, b = yield from open_masked(party, [input_of(party, x, wide, 2), input_of(party, y, bits, 3)])
            return multiply(party, a, b, bits)

        outcome = run(product)
        assert torch.equal(outcome.element(), reference.product(x, y, bits)) and outcome.server.frac == 5
    m, n = uniform(2, 3, 4, bits=bits), uniform(2, 4, 5, bits=bits)

    def matrices(party: Party) -> Protocol_[Shares]:
        a, b = yield from open_masked(party, [input_of(party, m, bits, 2), input_of(party, n, bits, 3)])
        return matmul_wires(party, a, Cached.join(None, b), bits)

    assert torch.equal(run(matrices).element(), reference.linear(m, n, bits))


@pytest.mark.parametrize("rows", LAYOUTS, ids=lambda rows: str(rows.fields()))
def test_products_over_rows_are_exact(rows: Rows) -> None:
    heads, width, bits = 2, 3, 29
    q, k, p = (uniform(heads, n, width, bits=bits) for n in (rows.number, rows.columns, 1))
    p, f = uniform(heads, rows.count, bits=bits), uniform(heads, rows.number, bits=bits)
    cut = rows.columns // 2

    def program(party: Party) -> Protocol_[Any]:
        inputs = [input_of(party, x, bits, 1) for x in (q, k[:, :cut], k[:, cut:], p, f)]
        a, early, late, c, d = yield from open_masked(party, inputs)
        cache = Cached.join(Cached.join(None, early), late)
        return scores(party, a, cache, rows, bits), weighted(party, c, cache, rows, bits), multiply(party, c, d, bits, rows)

    outcome = run(program)
    got = [signed(a.value + b.value, bits) for a, b in zip(outcome.server, outcome.client, strict=True)]
    dense = torch.zeros(heads, rows.number, rows.columns, dtype=torch.int64)
    every, spread, at = torch.empty_like(p), torch.empty_like(p), 0
    for row in range(rows.number):
        length = rows.first + row * rows.step
        part = slice(at, at + length)
        dense[:, row, :length] = p[:, part]
        every[:, part] = (q[:, row, None] * k[:, :length]).sum(-1)
        spread[:, part] = p[:, part] * f[:, row, None]
        at += length
    assert at == rows.count
    for value, want in zip(got, (every, dense @ k, spread), strict=True):
        assert torch.equal(value, reference.wrap(want, bits))


# ---- comparison, maximum, argmax


def comparison(x: Tensor, y: Tensor, bits: int, single: int = 0) -> Tensor:
    """The shared bit and its product with the mask, reconstructed and checked against each other."""

    def program(party: Party) -> Protocol_[Any]:
        (d,) = yield from open_masked(party, [input_of(party, x, bits, 0) - input_of(party, y, bits, 0)])
        name, beta = yield from compare(party, d.masked, CompareMask(d.name, d.shape, d.shape, bits, single))
        rho = party.take(BitMask(name, 0, d.shape, 9)).shares[0]
        return beta, rho, party.take(BitMask(name, d.name, d.shape, bits, d.shape)).shares[0], d.mask

    outcome = run(program)
    (beta, rho_s, rr_s, r_s), (other, rho_c, rr_c, r_c) = outcome.server, outcome.client
    rho = reduce(rho_s + rho_c, 9)
    assert torch.equal(beta, other) and set(rho.unique().tolist()) <= {0, 1} and set(beta.unique().tolist()) <= {0, 1}
    assert torch.equal(reduce(rr_s + rr_c, bits), reduce(rho * (r_s + r_c), bits))
    return beta ^ rho


@pytest.mark.parametrize(
    ("bits", "single"), [*((bits, 0) for bits in range(1, MAX_BITS + 1)), *((bits, 1) for bits in range(1, MAX_SINGLE + 1))]
)
def test_comparison_is_exact(bits: int, single: int) -> None:
    half = 1 << (bits - 1)
    y = uniform(400, bits=bits)
    step = torch.cat([torch.tensor([-half, half - 1, 0, -1, 1 % half, -half // 2, half // 2]).repeat(40), uniform(120, bits=bits)])
    assert torch.equal(comparison(y + step, y, bits, single), reference.compare(step, torch.zeros_like(step)))


def test_comparisons_may_share_a_mask() -> None:
    x, steps = uniform(5, 1, bits=12), torch.arange(-3, 4)

    def program(party: Party) -> Protocol_[Any]:
        (w,) = yield from open_masked(party, [input_of(party, x, 14, 0)])
        shape = (5, 7)
        c = reduce(w.masked - steps, 14) if not offline_walk(party) else torch.empty(shape, dtype=torch.int64, device="meta")
        name, beta = yield from compare(party, c, CompareMask(w.name, shape, (5, 1), 14))
        return beta, party.take(BitMask(name, 0, shape, 9)).shares[0]

    outcome = run(program)
    rho = reduce(outcome.server[1] + outcome.client[1], 9)
    assert torch.equal(outcome.server[0] ^ rho, reference.compare(x, steps))


SIZES = [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]


def contestants(heads: int, count: int, bits: int) -> Tensor:
    """Rows within half the ring of each other: anywhere in the ring, many ties, and far apart."""
    quarter = 1 << (bits - 2)
    x = torch.randint(-quarter, quarter, (heads, count))
    x[0] = torch.randint(0, 2, (count,))
    x[1] = torch.where(torch.rand(count) < 0.5, -quarter, quarter - 1)
    return x


@pytest.mark.parametrize("number", SIZES)
def test_row_maximum_is_exact(number: int) -> None:
    rows = Rows(1, number, 1) if number < 40 else Rows(number, 2, 0)
    for bits in (5, 10, 31):
        x = contestants(3, rows.count, bits)

        def program(party: Party, x: Tensor = x, bits: int = bits) -> Protocol_[Wire]:
            (w,) = yield from open_masked(party, [input_of(party, x, bits, 0)])
            return (yield from row_maximum(party, w, rows))

        assert torch.equal(run(program).element(), reference.row_maximum(x, rows))


def argmax(x: Tensor, bits: int) -> Tensor:
    rows = Rows(x.shape[1], 1, 0)

    def program(party: Party) -> Protocol_[Shares]:
        (w,) = yield from open_masked(party, [input_of(party, x, bits, 0)])
        return (yield from row_argmax(party, w, rows))

    outcome = run(program)
    return place_of(outcome.ring(), rows)


@pytest.mark.parametrize("count", [*SIZES, 1000, 50257])
def test_argmax_takes_the_first_of_equals(count: int) -> None:
    for bits in (7, 24) if count < 1000 else (24,):
        x = contestants(4, count, bits)
        x[2] = -3  # all equal
        x[3, [count // 3, count - 1]] = (1 << bits - 2) - 1  # two equal largest
        assert torch.equal(argmax(x, bits), reference.row_argmax(x))


def test_argmax_finds_every_place() -> None:
    assert torch.equal(argmax(torch.eye(37, dtype=torch.int64), 3), torch.arange(37)[:, None])


@pytest.mark.parametrize("shift", [1, 7, 11, 20])
def test_upper_bits_are_off_by_at_most_one(shift: int) -> None:
    x = uniform(2, 3000, bits=20)

    def program(party: Party) -> Protocol_[Wire]:
        (w,) = yield from open_masked(party, [input_of(party, x, 21, 12)])
        return upper_wire(party, w, shift)

    got, (floor, above) = run(program).element(), reference.rescale(x, shift, 21 - shift)
    assert ((got == floor) | (got == above)).all()
    exact = reduce(x, shift) == 0
    assert torch.equal(got[exact], floor[exact])


def test_tournaments_reduce_every_row_and_prefer_pairs_first() -> None:
    for rows in [*LAYOUTS, *(Rows(n, 1, 0) for n in range(1, 70)), Rows(1, 128, 1), Rows(1, 1024, 0)]:
        number, levels = rows.count, tournament(rows)
        for level in levels:
            members = torch.cat([group.index.reshape(-1) for group in level.groups])
            assert torch.equal(members.sort().values, torch.arange(number))
            assert sorted(level.order.tolist()) == list(range(level.count))
            number = level.count
        radix, size = 8 if rows.number == 1 else 4, radices(rows)
        most = [8 * radix**level for level in range(len(size) + 1)]  # that so many levels and one more bring down to one element
        assert number == rows.number and rows.columns <= (most[len(size) - 1] if size else 1)
        assert rows.columns > (most[len(size) - 2] if len(size) > 1 else len(size))
    assert radices(Rows(50257, 1, 0)) == (4, 4, 7, 8, 8, 8)
    assert [single_digit(1, Rows(50257, 1, 0), level, 16) for level in range(6)] == [False] * 4 + [True] * 2
    for columns, sizes in ((7, (7,)), (64, (2, 4, 8)), (128, (4, 4, 8)), (1024, (2, 4, 4, 4, 8))):
        rows = Rows(1, columns, 1)
        single = [single_digit(12, rows, level, 10) for level in range(len(sizes))]
        assert radices(rows) == sizes and not single[0] and single[-1] == (columns > 8)
        assert columns > 128 or all(single[1:]), "short rows take one digit after the first level"


# ---- rounds


def test_parallel_merges_rounds_of_unequal_length() -> None:
    x = uniform(6, bits=20)

    def program(party: Party) -> Protocol_[Any]:
        def short() -> Protocol_[Wire]:
            (w,) = yield from open_masked(party, [input_of(party, x, 20, 0)])
            return w

        def long() -> Protocol_[Tensor | None]:
            (w,) = yield from open_masked(party, [input_of(party, x, 21, 0)])
            (w,) = yield from open_masked(party, [unmasked(party, w)])
            return (yield from reveal(party, unmasked(party, w), to=Role.CLIENT))

        def local() -> Protocol_[int]:
            return 7
            yield

        return (yield from parallel(short(), long(), local()))

    outcome = run(program)
    assert torch.equal(element(outcome.server[0], outcome.client[0]), x)
    assert torch.equal(signed(outcome.client[1], 21), x) and outcome.server[1] is None
    assert outcome.client[2] == 7 and outcome.counted["online"]["rounds"] == 3


# ---- at length


@pytest.mark.slow
def test_a_hundred_million_truncations() -> None:
    for bits, shift, to_bits in ((40, 16, 40), (64, 16, 64)):
        for _ in range(10):
            x = torch.randint(-(1 << bits - 2), 1 << bits - 2, (5_000_000,))

            def program(party: Party, x: Tensor = x, bits: int = bits, shift: int = shift, to_bits: int = to_bits) -> Protocol_[Shares]:
                return (yield from rescale(party, input_of(party, x, bits, shift), bits=to_bits, frac=0))

            outcome = run(program)
            floor, above = reference.rescale(x, shift, to_bits)
            got = outcome.element()
            assert ((got == floor) | (got == above)).all()


@pytest.mark.slow
def test_ten_million_comparisons() -> None:
    for bits in (10, 13, 20, 31):
        for _ in range(3):
            x = torch.randint(-(1 << bits - 2), 1 << bits - 2, (850_000,))
            y = torch.where(
                torch.rand(850_000) < 0.2, x + torch.randint(-1, 2, (850_000,)), torch.randint(-(1 << bits - 2), 1 << bits - 2, (850_000,))
            )
            assert torch.equal(comparison(x, y, bits), reference.compare(x, y))
