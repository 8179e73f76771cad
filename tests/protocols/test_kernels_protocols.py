"""Protocols by compiled loops and by their plain twins: the same messages and the same shares, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols import kernels
from protocols.activation import gelu
from protocols.ceiling import row_ceiling
from protocols.comparison import CompareMask, compare
from protocols.exponential import Window, exponential
from protocols.linear import Weight, linear
from protocols.maximum import row_argmax, row_maximum
from protocols.norm import layer_norm
from protocols.opening import open_masked
from protocols.party import Party, Protocol_
from protocols.reciprocal import reciprocal
from protocols.ring import known, reduce
from protocols.rows import Rows, Stacked
from protocols.softmax import softmax
from protocols.table import read
from protocols.truncation import rescale
from tests.support import two_party
from tests.support.two_party import Outcome, Weights, input_of, run, uniform


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    kernels.load(None)
    assert kernels.status() == "compiled"


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same in every run: all that the parties and the dealer draw."""
    drawn = iter(range(10**6))
    monkeypatch.setattr(two_party, "new_seed", lambda: (next(drawn) % 3).to_bytes(16, "big"))
    yield


def same(protocol: Callable[[Party], Protocol_[Any]], weights: Weights | None = None) -> None:
    """Both ways: what is dealt, what travels, and what both end with; the upper bits of what a party keeps are arbitrary."""

    def once() -> Outcome:
        torch.manual_seed(3)
        return run(protocol, weights)

    assert kernels.fast is not None
    found = once()
    with kernels.plain():
        want = once()
    assert found.dealt == want.dealt
    for role in found.received:
        pairs = list(zip(found.received[role], want.received[role], strict=True))
        assert all(part == other and torch.equal(x, y) for (part, x), (other, y) in pairs)
    for ours, theirs in ((found.server, want.server), (found.client, want.client)):
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert torch.equal(reduce(ours.value, ours.bits), reduce(theirs.value, theirs.bits))


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (5, 7), (3, 1030)])
@pytest.mark.parametrize(
    ("bits", "frac", "to_bits", "to_frac"), [(38, 24, 14, 0), (38, 24, 40, 12), (64, 20, 64, 8), (20, 8, 40, 8), (64, 8, 64, 8)]
)
def test_rescaling(bits: int, frac: int, to_bits: int, to_frac: int, shape: tuple[int, ...], nonnegative: bool) -> None:
    torch.manual_seed(0)
    x = uniform(*shape, bits=bits)
    same(lambda party: rescale(party, input_of(party, x, bits, frac), bits=to_bits, frac=to_frac, nonnegative=nonnegative))
    same(lambda party: rescale(party, input_of(party, x, bits, frac).map(lambda v: v.mT if v.dim() > 1 else v), bits=to_bits, frac=to_frac))


def comparisons(party: Party, x: Tensor, bits: int, single: int, thresholds: int) -> Protocol_[Tensor]:
    (wire,) = yield from open_masked(party, [input_of(party, x, bits, 0)])
    shape = (*x.shape, thresholds)
    kind = CompareMask(wire.name, shape, (*x.shape, 1), bits, single)
    c = (wire.masked[..., None] - torch.arange(thresholds)) if known(wire.masked) else wire.masked.new_empty(shape, device="meta")
    c = reduce(c, bits)
    _, beta = yield from compare(party, c, kind)
    return beta


@pytest.mark.parametrize("thresholds", [1, 3])
@pytest.mark.parametrize(
    ("bits", "single"), [(2, 0), (2, 1), (7, 0), (8, 0), (10, 1), (12, 1), (19, 0), (25, 0), (31, 0), (37, 0), (43, 0)]
)
def test_comparisons_of_every_number_of_digits(bits: int, single: int, thresholds: int) -> None:
    torch.manual_seed(0)
    x = uniform(2, 20, bits=bits - 1)
    same(lambda party: comparisons(party, x, bits, single, thresholds))


@pytest.mark.parametrize("rows", [Rows(1, 9, 1), Rows(6, 1, 0), Rows(5, 3, 0), Rows(70, 1, 0), Rows(1, 1, 0)])
def test_largest_elements(rows: Rows) -> None:
    torch.manual_seed(0)
    x = uniform(2, rows.count, bits=9)

    def largest(party: Party) -> Protocol_[Tensor]:
        (wire,) = yield from open_masked(party, [input_of(party, x, 11, 0)])
        return (yield from row_maximum(party, wire, rows)).masked

    def place(party: Party) -> Protocol_[Any]:
        (wire,) = yield from open_masked(party, [input_of(party, x, 11, 0)])
        return (yield from row_argmax(party, wire, rows))

    def bound(party: Party) -> Protocol_[Tensor]:
        (wire,) = yield from open_masked(party, [input_of(party, x << 8, 21, 0)])
        return (yield from row_ceiling(party, wire, rows, 12)).masked

    same(largest)
    same(bound)
    if rows.number == 1:
        same(place)


def test_whole_operators() -> None:
    torch.manual_seed(0)
    rows, x = Rows(3, 6, 2), torch.randn(2, Rows(3, 6, 2).count)
    same(lambda party: softmax(party, input_of(party, x, 40, 12), rows, bits=40, frac=13))
    same(lambda party: gelu(party, input_of(party, x, 40, 12), "tanh", compare_bits=20, bits=40))
    same(lambda party: layer_norm(party, input_of(party, x, 40, 12), epsilon=1e-5, size_bits=20, bits=40))
    weight, values, y = Weight("w", (48, 33), 44, 8), uniform(48, 33, bits=15), uniform(9, 48, bits=30)
    same(lambda party: linear(party, input_of(party, y, 44, 12), weight, bits=44), {"w": (weight, values)})


@pytest.mark.parametrize(("bound", "exact"), [(3.0, None), (30.0, None), (200.0, None), (1700.0, None), (500.0, 5.0)])
@pytest.mark.parametrize("shape", [(0,), (2, 9)])
def test_reciprocals_of_every_number_of_tables(bound: float, exact: float | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = 0.6 + torch.rand(shape).double() * (bound - 0.7)
    same(lambda party: reciprocal(party, input_of(party, x, 44, 16), bound=bound, bits=40, frac=20, exact=exact))


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5)])
@pytest.mark.parametrize(("words", "tables"), [(1, 1), (8, 3), (4, 2)])
def test_tables(shape: tuple[int, ...], words: int, tables: int) -> None:
    hot, index = uniform(*shape, words), uniform(*shape)
    entries = uniform(tables, 64 * words)
    assert kernels.fast is not None
    for part in (hot, hot.clone().as_strided(hot.shape, hot.stride()), torch.cat([hot, hot], -1)[..., :words]):
        found = read(part, index, entries)
        if hot.numel():
            with kernels.plain():
                assert torch.equal(found, read(part, index, entries))
        else:
            assert found.shape == (tables, *shape)


@pytest.mark.parametrize(
    "rows", [Rows(3, 6, 2), Rows(4, 5, 0), Stacked.of([Rows(7, 1, 1), Rows(2, 3, 1)]), Stacked.of([Rows(9, 1, 1)] * 8)]
)
def test_sums_of_rows(rows: Rows) -> None:
    x = uniform(3, rows.count + 1)[:, 1:]
    found = rows.sum(x)
    with kernels.plain():
        assert torch.equal(found, rows.sum(x))
    lengths = [int(length) for length in rows.lengths]
    assert torch.equal(found, torch.stack([part.sum(-1) for part in torch.split(x, lengths, 1)], 1))


WINDOWS = [
    (Window.saturating(21, 60), False),
    (Window.saturating(25, 3, 12), True),
    (Window(-1, 16, 126, 3, 13), True),
    (Window.saturating(26, 64, 11), True),
    (Window.saturating(18, 65, 12), False),
    (Window(0, 21, 60, 2, 13, fine=2), True),
]


@pytest.mark.parametrize(("window", "divided"), WINDOWS)
def test_an_exponential_without_a_maximum(window: Window, divided: bool) -> None:
    x, divisor = uniform(3, 500, bits=22), (torch.arange(500) % 4, (1 << 14) + torch.arange(500) % 99) if divided else None

    def protocol(party: Party) -> Protocol_[Any]:
        (wire,) = yield from open_masked(party, [input_of(party, x, 22, 12)])
        return (yield from exponential(party, wire, None, Rows(500, 3, 0), 0, window=window, divisor=divisor))

    same(protocol)
