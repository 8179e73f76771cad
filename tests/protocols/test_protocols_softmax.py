"""The exponential, the reciprocal, softmax and attention against their plaintext twins, within the bounds of their docstrings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from protocols import exponential as exp
from protocols import reciprocal as rec
from protocols import reference
from protocols.errors import CorrelationError
from protocols.opening import open_masked
from protocols.party import Party, Protocol_
from protocols.product import Cached
from protocols.reciprocal import reciprocal
from protocols.ring import encode
from protocols.rowrange import RowRange
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.softmax import LARGEST, AttentionRings, attention, bounded_exponentials, exponentials, softmax
from tests.support.two_party import Session, input_of, offline_walk, run, uniform


def test_exponential_tables_are_exact() -> None:
    """Running sums of the multipliers are rounded, factors to nearest; against decimal arithmetic."""
    windows = [exp.BELOW_MAXIMUM, *(exp.Window.saturating(21, 60, low) for low in (13, 12, 11))]
    for window in (*windows, *(replace(window, fine=exp.FINER) for window in windows[::2])):
        size, frac = 1 << window.places, exp.FRAC + window.fine
        factors = exp.factors(window.low, window.fine)
        for low in (0, 1, 2, size // 4 - 1, size // 4, size * 3 // 5, size - 1):
            exact = reference.exact_exponential(size // 2 - low, 1 << frac, window.factor_frac)
            assert abs(int(factors[low]) - exact) <= 0.5
            assert int(factors[low]) < 1 << exp.factor_bits(window.low)
        table, points = exp.multipliers(window), torch.arange(size).double() / 2**frac
        for row, digit in enumerate(window.digits):
            exact_sums = (torch.exp(points + window.unit * (digit - 1)) * 2**exp.ENTRY_FRAC).cumsum(0)
            assert ((table[row].cumsum(0) - exact_sums).abs() <= 0.51 + 1e-13 * exact_sums).all()
            for low in (0, 1, size // 4 - 1, size * 3 // 5, size - 1):
                exact = reference.exact_exponential((digit - 1) * size + low, 1 << frac, exp.ENTRY_FRAC)
                assert abs(int(table[row, low]) - exact) < 1


def exponential_errors(d: Tensor) -> Tensor:
    """The protocol's result minus e^d, for integers d (H, N) with 12 fraction bits; the maximum may be anything."""
    rows = Rows(d.shape[1], 1, 0)
    m = uniform(d.shape[0], 1, bits=10)
    x = d + (m << 11)

    def program(party: Party) -> Protocol_[Shares]:
        w, top = yield from open_masked(party, [input_of(party, x, 21, 12), input_of(party, m, 10, 1)])
        return (yield from exp.exponential(party, w, top, rows, 11))

    return run(program).value() - reference.exponential(d / 2.0**12)


def test_exponential_is_within_its_bound_over_its_domain() -> None:
    low, high = -244 << 12, (1 << 11) - 1
    d = torch.cat([torch.randint(low, high + 1, (4, 20000)), torch.randint(-20 << 12, high + 1, (4, 60000))], -1)
    d[:, :8] = torch.tensor([low, low + 1, high, high - 1, 0, -1, -(4 << 12), 4 << 9])
    error = exponential_errors(d).abs()
    assert (error <= reference.exponential_bound(d / 2.0**12)).all()


@pytest.mark.parametrize("columns", [1, 9, 70])
def test_finer_scores(columns: int) -> None:
    """Exponentials of scores with two fraction bits more follow them: the same as of those with 12, but for what they are rounded to."""
    rows = Rows(columns, 4, 0)
    x = torch.randint(-6 << 14, 6 << 14, (3, rows.count))
    exact = rows.unpack(torch.exp(x.double() / 2**14))

    def errors(make: Callable[[Party, Shares], Protocol_[Shares]]) -> Tensor:
        def program(party: Party) -> Protocol_[Shares]:
            return (yield from make(party, input_of(party, x, 23, 14)))

        e = rows.unpack(run(program).value())
        return e / e.sum(-1, keepdim=True) - exact / exact.sum(-1, keepdim=True)

    within = RowRange(12, 30, 34, False, fine=2)
    for made in (
        errors(lambda party, score: exponentials(party, score, rows, 44, fine=2)),
        errors(lambda party, score: bounded_exponentials(party, score, rows, 44, within)),
    ):
        assert float(made.abs().max()) < 1e-4  # and not 2^-12, as where the two bits are lost


def test_exponential_is_right_on_average() -> None:
    """Rounding to nearest would lose up to 9e-6 each, the same way in all elements of a row: 1 % of a row of a thousand."""
    for d in (0.4, -2.0, -7.7, -10.3, -12.4, -16.0):
        errors = exponential_errors(torch.full((1, 60000), round(d * 4096)))
        assert abs(errors.mean()) < 2e-7 + 6 * float(errors.std()) / 60000**0.5


@pytest.mark.parametrize(("frac", "bits", "low_bits"), [(16, 0, 13), (21, 0, 13), (25, 0, 12), (19, 64, 13), (18, 0, 11), (17, 52, 12)])
def test_an_exponential_without_a_maximum_is_within_its_bound_and_saturates(frac: int, bits: int, low_bits: int) -> None:
    """Below 0 as below a maximum, scaled; above, between 1 and two units' power of e; far below, nothing."""
    window, offset = exp.Window.saturating(frac, 60, low_bits), 5 << 12
    low, high = round(-66 * window.unit) << 12, (round(60 * window.unit) << 12) - 1
    d = torch.cat([torch.randint(low, high, (4, 4000)), torch.randint(-20 << 12, 2 << 12, (4, 20000))], -1)
    d[:, :8] = torch.tensor([low, low + 1, high, high - 1, 0, -1, 1 << 12, 4 << 9])
    rows = Rows(d.shape[1], 4, 0)

    def program(party: Party) -> Protocol_[Shares]:
        (wire,) = yield from open_masked(party, [input_of(party, d + offset, 21, 12)])
        where = torch.full((d.shape[1],), offset)
        return (yield from exp.exponential(party, wire, None, rows, 0, window=window, offset=where, bits=bits))

    outcome = run(program)
    assert outcome.server.bits == (bits or window.bits)
    value, exact = outcome.value() / 2.0 ** (frac - 16), reference.exponential(d / 2.0**12)
    below = d < 0
    error = (value - exact).abs()[below]
    assert (error <= 5.7e-5 * exact[below] + 1.6e-5 * 2.0 ** (16 - frac) + 1e-7).all()
    assert value[~below].min() > 1 - 1e-4 and value[~below].max() < window.largest * (1 + 1e-4)


@pytest.mark.parametrize("bound", [1.0, 1.66, 2.0, 7.3, 212.5, 512.0, 1700.0, 4096.0])
def test_reciprocal_is_within_its_bound(bound: float) -> None:
    # where one table follows another, and at the octaves
    near = torch.tensor(
        [2.0**k * f for k in range(13) for f in (0.93, 0.968, 0.97, 62 / 64, 63 / 64, 1 - 2**-12, 1, 1 + 2**-12, 1.03, 1.5)]
    )
    s = torch.cat([near, 0.55 + torch.rand(3000) * (bound - 0.55), torch.exp(torch.rand(3000) * 9) * 0.55, torch.tensor([0.55])]).double()
    s = s[(s >= 0.55) & (s < bound)][None]
    for ring, (bits, frac) in (((44, 16), (40, 20)), ((47, 16), (39, 20)), ((30, 12), (33, 15))):
        exact = encode(s, ring[1]).double() / 2.0 ** ring[1]

        def program(party: Party, ring: tuple[int, int] = ring, bits: int = bits, frac: int = frac) -> Protocol_[Shares]:
            return (yield from reciprocal(party, input_of(party, s, *ring), bound=bound, bits=bits, frac=frac))

        outcome = run(program)
        error = outcome.value() - reference.reciprocal(exact)
        assert (error.abs() <= reference.reciprocal_bound(exact, frac)).all()
        assert (outcome.server.bits, outcome.server.frac) == (bits, frac)


@pytest.mark.parametrize("table", range(5))
@pytest.mark.parametrize("last", [3, 5, 7])
def test_lines_of_the_reciprocal(table: int, last: int) -> None:
    """Every line of every table, in reals, over the whole of its range: where a table ends the next begins."""
    tables = rec.Tables(5, last)
    at, low = tables.places(16, table)
    lines = rec._lines(16, tables, table, 30).double()
    used = lines[0] > 0
    assert torch.equal(lines[2], (torch.arange(512) < tables.first(table)).double())
    if table:  # a sum below its first line has an index in the table below
        assert tables.first(table) << (at - tables.places(16, table - 1)[0]) < 511
    else:
        assert (lines[0, :2] == lines[0, 2]).all() and (lines[1, :2] == 0).all()
        used[:2] = False
    index = torch.arange(512)[used]
    unit, value, slope = 2.0 ** (at - 16), lines[0][used] / 2.0**30, lines[1][used] / 2.0 ** (30 - 16 + low)
    for part in torch.linspace(-1, 1, 41, dtype=torch.float64):
        s = (index + part) * unit
        bound = (0.5 / (index - 1.0) ** 2).clamp(min=1.28e-4)  # where the chord's ends are far apart
        assert ((value + slope * part * unit - 1 / s).abs() <= bound / s + 2.0**-22).all()
    assert index[-1] == 511 and index[0] == max(tables.first(table), 2)
    assert index[0] == 2 or index[0] == 63 or (table == 4 and last > 3)


# ---- softmax


def row_starts(rows: Rows) -> Tensor:
    return torch.tensor([0, *(rows.first + k * rows.step for k in range(rows.number - 1))]).cumsum(0)


def score_rows(heads: int, rows: Rows) -> dict[str, Tensor]:
    """Scores within 64 of all kinds, (H, N) with 12 fraction bits."""
    shape, starts = (heads, rows.count), row_starts(rows)
    last = starts + rows.first + rows.step * torch.arange(rows.number) - 1
    dominant, sink = torch.full(shape, -64.0), -10 - torch.rand(shape)
    dominant[:, last], sink[:, starts] = 64.0, 0.3
    kinds = {
        "anywhere": torch.rand(shape) * 128 - 64,
        "std 2": torch.randn(shape) * 2,
        "ties": torch.full(shape, 63.9),
        "lowest": torch.full(shape, -64.0),
        "one dominant": dominant,
        "first dominant, the rest just above nothing": sink,
        "two values": torch.randint(0, 2, shape) * 0.25,
    }
    return {name: encode(x, 12) for name, x in kinds.items()}


def softmax_errors(x: Tensor, rows: Rows) -> Tensor:
    """Of integers x (H, N) with 12 fraction bits, so that the scores are not rounded."""

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from softmax(party, input_of(party, x, 21, 12), rows, bits=30, frac=24))

    return run(program).value() - reference.softmax(x / 2.0**12, rows)


ROWS = [*(Rows(n, 6, 0) for n in (1, 2, 3, 5, 8, 17)), Rows(1, 1, 0), Rows(1, 40, 1), Rows(128, 20, 0), Rows(1018, 7, 1), Rows(97, 3, 13)]


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: str(rows.fields()))
def test_softmax_is_within_its_bound(rows: Rows) -> None:
    for name, x in score_rows(3, rows).items():
        error = softmax_errors(x, rows).abs()
        assert (error <= reference.softmax_bound(rows)).all(), name
        if name == "one dominant":
            assert error.max() < 1.8e-4 + 6 * 6e-6 * rows.columns**0.5


@pytest.mark.parametrize("early", [False, True])
def test_softmax_rounds_scores_of_a_wider_ring(early: bool) -> None:
    rows = Rows(1, 30, 1)
    x = torch.rand(4, rows.count).double() * 20 - 10

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from softmax(party, input_of(party, x, 33, 24, early=early), rows, bits=39, frac=36))

    error = run(program).value() - reference.softmax(x, rows)
    assert (error.abs() <= reference.softmax_bound(rows) + 2.0**-12).all()


def test_exponentials_leave_room_in_their_ring() -> None:
    """The largest of a row is between e^-0.5 and e^0.5, whatever the scores, and the bound on the rows' sums holds."""
    rows = Rows(1, 60, 1)
    for scores in score_rows(3, rows).values():
        for bits in (18, 44, 64):

            def program(party: Party, x: Tensor = scores, bits: int = bits) -> Protocol_[Shares]:
                return (yield from exponentials(party, input_of(party, x, 21, 12), rows, bits))

            e = run(program).value()
            assert e.max() < LARGEST and e.min() > -4e-5
            assert (reference.row_maximum(e, rows) > 0.606).all()


# ---- attention


def attention_inputs(heads: int, rows: Rows, width: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Integers with 12 fraction bits."""
    shapes = (heads, rows.number, width), (heads, rows.columns, width), (heads, rows.columns, width)
    q, k, v = (encode(torch.randn(shape) * factor, 12) for shape, factor in zip(shapes, (spread, 1.0, 1.0), strict=True))
    return q, k, v


def reals(*values: Tensor) -> list[Tensor]:
    return [value / 2.0**12 for value in values]


ATTENTION_RINGS = [
    AttentionRings(),
    AttentionRings(qk_bits=35, v_bits=45, sum_frac=10, product_bits=39, out_bits=33, out_frac=11),
    AttentionRings(out_bits=20, out_frac=12),
    AttentionRings(score_fine=2, out_bits=24),
]


@pytest.mark.parametrize("rings", ATTENTION_RINGS, ids=lambda rings: f"{rings.product_bits}-{rings.out_bits}")
@pytest.mark.parametrize("rows", [Rows(1, 1, 0), Rows(1, 24, 1), Rows(30, 1, 1), Rows(64, 5, 1), Rows(9, 7, 0), Rows(700, 2, 1)])
def test_attention(rows: Rows, rings: AttentionRings) -> None:
    q, k, v = attention_inputs(3, rows, 8, 1.5)

    def program(party: Party) -> Protocol_[Shares]:
        inputs = [input_of(party, x, bits, 12) for x, bits in ((q, rings.qk_bits), (k, rings.qk_bits), (v, rings.v_bits))]
        a, b, c = yield from open_masked(party, inputs)
        return (yield from attention(party, a, Cached.join(None, b), Cached.join(None, c), rows, rings))

    outcome = run(program)
    assert (outcome.server.bits, outcome.server.frac) == (rings.out_bits, rings.out_frac)
    error = (outcome.value() - reference.attention(*reals(q, k, v), rows)).abs()
    bound = reference.attention_bound(rows, float(v.abs().max()) / 2**12) + 2.0 ** (1 - min(rings.sum_frac, rings.out_frac))
    assert (error <= bound).all()


def test_attention_over_a_cache_that_grows() -> None:
    """Four passes of one session; keys and values are opened once, under masks that outlive their pass."""
    session, heads, width, rings = Session(), 2, 6, AttentionRings()
    total = 20
    q, k, v = attention_inputs(heads, Rows(total, total, 0), width, 1.5)
    caches: dict[bool, tuple[Cached, Cached] | None] = {True: None, False: None}
    done = 0
    for new in (7, 1, 4, 8):
        rows = Rows(done + 1, new, 1)
        at = slice(done, done + new)

        def program(party: Party, at: slice = at, rows: Rows = rows) -> Shares:
            def protocol() -> Protocol_[tuple[Shares, tuple[Cached, Cached]]]:
                (a,) = yield from open_masked(party, [input_of(party, q[:, at], rings.qk_bits, 12)])
                fresh = [input_of(party, k[:, at], rings.qk_bits, 12), input_of(party, v[:, at], rings.v_bits, 12)]
                b, c = yield from open_masked(party, fresh, keep=True)
                before = caches[party.is_server]
                old_keys, old_values = (None, None) if before is None else before
                cache = Cached.join(old_keys, b), Cached.join(old_values, c)
                return (yield from attention(party, a, *cache, rows, rings)), cache

            out, cache = party.run(protocol())
            if not offline_walk(party):
                caches[party.is_server] = cache
            return out

        outcome = session.run(program)
        done += new
        want = reference.attention(*reals(q[:, at], k[:, :done], v[:, :done]), rows)
        bound = reference.attention_bound(rows, float(v.abs().max()) / 2**12)
        assert ((outcome.value() - want).abs() <= bound).all()
        # a later pass opens only what is new
        assert outcome.predicted.online_bytes < 40 * heads * (3 * new * width + rows.count)
    session.made.dealer.forget()
    with pytest.raises(CorrelationError, match="does not exist"):
        session.run(program)


# ---- at length


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 7, 64, 128, 333, 1024])
def test_thousands_of_softmaxes(length: int) -> None:
    rows = Rows(length, min(2000, 20000 // length), 0)
    for _ in range(10):
        for name, x in score_rows(4, rows).items():
            assert (softmax_errors(x, rows).abs() <= reference.softmax_bound(rows)).all(), name
