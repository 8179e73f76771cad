"""The dual form of a recurrence against the recurrence itself, over passes and blocks, for what it declares."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from protocols import reference
from protocols.party import Party, Protocol_
from protocols.scan import FINEST, LOWEST, OUT, STATE_FRAC, Scan, ScanRings, State, cost_scan, powers, scan
from protocols.shares import Shares
from tests.support.two_party import Outcome, element, execute, input_of

H, N, P = 3, 4, 5
SHIFTS = (1, 3, 7)
MODES = {
    "public": Scan(ScanRings(36, 46, 44), SHIFTS),
    "convex": Scan(ScanRings(36, 42, 44)),
    "plain": Scan(ScanRings(36, 42, 44), convex=False),
    "finer": Scan(ScanRings(36, 42, 44, finer=4), convex=False),
}


def drawn(count: int, steepest: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, b, c, z, in units of 2^-15."""
    generator = torch.Generator().manual_seed(count)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((H, count, P), (1, count, N), (1, count, N))]
    x, b, c = (torch.round(value * 2**15) / 2**15 for value in values)
    return x, b, c, steepest * torch.rand(H, count, generator=generator, dtype=torch.float64)


def factors(how: Scan, z: Tensor) -> tuple[Tensor, Tensor]:
    """a and u."""
    a = torch.exp(-z) if not how.shifts else torch.tensor([1 - 2.0**-shift for shift in how.shifts]).double()[:, None].expand_as(z)
    return a, 1 - a if how.convex else torch.ones_like(a)


def passes(how: Scan, values: tuple[Tensor, Tensor, Tensor, Tensor], ends: tuple[int, ...], frac: int = 15) -> Outcome:
    """Passes that end at these positions; each party's outputs and the last state."""

    def program(party: Party) -> tuple[list[Shares], Shares]:
        def all_() -> Protocol_[tuple[list[Shares], Shares]]:
            state: State | None = None
            found, start = [], 0
            for end in ends:
                x, b, c, z = (input_of(party, value[:, start:end], 62, frac) for value in values)
                y, state = yield from scan(party, x, b, c, None if how.shifts else z, state, how)
                found += [] if y is None else [y]
                start = end
            assert state is not None
            return found, state.shares

        return party.run(all_())

    return execute(program)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ends", "block"), [((1, 2, 3), 128), ((7, 8, 12), 128), ((9, 14), 4)], ids=["tokens", "pieces", "blocks"])
def test_it_is_the_recurrence(mode: str, ends: tuple[int, ...], block: int) -> None:
    how = MODES[mode]
    how = replace(how, rings=replace(how.rings, block=block))
    values = drawn(ends[-1])
    outcome = passes(how, values, ends)
    x, b, c, z = values
    given = (x, b[0], c[0], *factors(how, z), torch.zeros(H, N, P).double())
    y, h = reference.recurrence(*given)
    found = torch.cat([element(*both).double() / 2.0**OUT for both in zip(outcome.server[0], outcome.client[0], strict=True)], 1)
    bound = reference.recurrence_bound(*given)
    assert float((found - y).abs().max()) < bound
    assert float((element(outcome.server[1], outcome.client[1]).double() / 2.0**STATE_FRAC - h).abs().max()) < bound
    assert outcome.predicted.online_bytes == outcome.counted["online"]["payload"]
    assert outcome.predicted.rounds == outcome.counted["online"]["rounds"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", ["all", "last", "none"])
@pytest.mark.parametrize(("count", "block"), [(1, 128), (7, 128), (7, 3)])
def test_it_costs_what_it_declares(mode: str, wanted: Literal["all", "last", "none"], count: int, block: int) -> None:
    """A pass without a state before it, and then one with."""
    how = replace(MODES[mode], rings=replace(MODES[mode].rings, block=block), wanted=wanted)
    outcome = passes(how, drawn(2 * count), (count, 2 * count))
    declared = cost_scan(H, count, P, N, how, first=True) + cost_scan(H, count, P, N, how, first=False)
    assert (declared.online, declared.rounds, declared.dealer) == (
        outcome.counted["online"]["payload"],
        outcome.counted["online"]["rounds"],
        len(outcome.dealt),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [128, 4])
def test_the_last_position_alone(mode: str, block: int) -> None:
    """It is the recurrence's, and so is the state, for less."""
    how = replace(MODES[mode], rings=replace(MODES[mode].rings, block=block), wanted="last")
    values = drawn(11)
    outcome, whole = passes(how, values, (6, 11)), passes(replace(how, wanted="all"), values, (6, 11))
    x, b, c, z = values
    given = (x, b[0], c[0], *factors(how, z), torch.zeros(H, N, P).double())
    y, h = reference.recurrence(*given)
    found = torch.cat([element(*both).double() / 2.0**OUT for both in zip(outcome.server[0], outcome.client[0], strict=True)], 1)
    bound = reference.recurrence_bound(*given)
    assert float((found - y[:, [5, 10]]).abs().max()) < bound
    assert float((element(outcome.server[1], outcome.client[1]).double() / 2.0**STATE_FRAC - h).abs().max()) < bound
    assert outcome.predicted.online_bytes < 0.8 * whole.predicted.online_bytes


def test_the_same_small_value_at_each_position_adds_up_to_little_error() -> None:
    """Its rounding is the same at each, and so is the sum's part of it."""
    count = 60
    x = torch.full((H, count, P), 0.4 * 2.0**-14 + 2.0**-6, dtype=torch.float64)
    b, c = (torch.full((1, count, N), 3.0, dtype=torch.float64) for _ in range(2))
    z = torch.full((H, count), 2.0**-8, dtype=torch.float64)
    zero = torch.zeros(H, N, P).double()
    worst = {}
    for finer in (0, FINEST):
        how = Scan(ScanRings(40, 46, 48, finer=finer), convex=False)
        outcome = passes(how, (x, b, c, z), (count,), frac=20)
        y = element(outcome.server[0][0], outcome.client[0][0])
        worst[finer] = float((y.double() / 2.0**OUT - reference.recurrence(x, b[0], c[0], *factors(how, z), zero)[0]).abs().max())
    assert worst[FINEST] < worst[0] / 4


def test_steep_decays_leave_nothing_and_wrap_nothing() -> None:
    """A block of positions whose decays sum to just below the bound."""
    x, b, c, _ = drawn(6)
    z = torch.full((H, 6), (LOWEST - 1) / 6, dtype=torch.float64)
    outcome = passes(MODES["plain"], (x, b, c, z), (3, 6))
    y = torch.cat([element(*both).double() / 2.0**OUT for both in zip(outcome.server[0], outcome.client[0], strict=True)], 1)
    alone = (c[0] * b[0]).sum(1)[None, :, None] * x  # all that was before is gone
    assert float((y - alone).abs().max()) < 2e-3 * float(alone.abs().max())


def test_public_decays_are_the_same_integers_everywhere() -> None:
    wanted = [[math.floor(2**22 * (1 - 2.0**-shift) ** n + 0.5) for n in range(40)] for shift in (1, 4, 16)]
    assert powers((1, 4, 16), 40).tolist() == wanted
