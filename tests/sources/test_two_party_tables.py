"""Makers of what reads tables: the relation for all that networks ask for, at the edges of masks, and errors end to end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from protocols import exponential as exp
from protocols import reference
from protocols.activation import MASKS, PRODUCT_BITS, PiecesMask
from protocols.correlations import Kind, Mask, Part, Role
from protocols.norm import RING, InverseRootMask, SquareMask, centred
from protocols.opening import open_masked
from protocols.ot.transfers import Transfers
from protocols.party import Party, Protocol_
from protocols.reciprocal import ReciprocalMask, Tables, reciprocal
from protocols.rows import Rows
from protocols.shares import Shares
from tests.protocols.test_sources import Book, holds
from tests.support.alone import Alone
from tests.support.two_party import Session, input_of, uniform

COUNT = 90


def reciprocals() -> list[tuple[Kind, ...]]:
    """Sums of all widths; tables whose index starts at bit 0, whose lines read fewer bits than there may be, and all."""
    fields = [(16, 3, 50), (16, 1, 54), (16, 5, 49), (12, 2, 43), (7, 1, 40), (7, 3, 33), (8, 2, 64), (10, 2, 20), (24, 2, 50)]
    tables = [(*each, 3) for each in fields] + [(16, 3, 50, 7), (16, 2, 47, 5)]
    return [
        (Mask((COUNT,), Tables(number, last).bits(frac)), ReciprocalMask(1, (COUNT,), frac, number, ring, last))
        for frac, number, ring, last in tables
    ]


def exponentials() -> list[tuple[Kind, ...]]:
    rows = [(Rows(1, 12, 1), 2), (Rows(45, 2, 0), 1), (Rows(1, 3, 0), 30)]
    alone: list[tuple[Kind, ...]] = [
        (Mask((3, 50), 21), exp.ExpMask(1, 0, (3, 50), 0, (), bits, low)) for bits, low in ((37, 11), (43, 12), (52, 13), (64, 13))
    ]
    alone += [
        (Mask((3, 50), 22), exp.FinerExpMask(1, 0, (3, 50), 0, (), 43, 12, 2)),
        (Mask((2, 60), 23), Mask((2, 1), 10), exp.FinerExpMask(1, 2, (2, 60), 13, Rows(60, 1, 0).fields())),
    ]
    return alone + [
        (Mask((heads, r.count), 21), Mask((heads, r.number), bits), exp.ExpMask(1, 2, (heads, r.count), shift, r.fields()))
        for r, heads in rows
        for bits, shift in ((10, 11), (21, 0), (20, 5))
    ]


def others() -> list[tuple[Kind, ...]]:
    shape, size = (9, 10), 10
    found: list[tuple[Kind, ...]] = [
        (Mask(shape, centred(size)[0]), SquareMask(1, (9,), centred(size)[0])),
        (Mask(shape, 64), SquareMask(1, (9,), 64)),
    ]
    found.append((Mask((COUNT,), RING), Mask((COUNT,), 9), InverseRootMask(1, 2, (COUNT,))))
    return [*found, *((Mask(shape, PRODUCT_BITS), kind(1, shape, shift)) for kind in MASKS.values() for shift in (7, 0, 1, 9))]


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("kinds", [*reciprocals(), *exponentials(), *others()], ids=lambda kinds: str(kinds[-1])[:60])
def test_what_is_made_is_what_the_kind_says(kinds: Sequence[Kind], edges: bool) -> None:
    """Of uniform masks, and of masks whose parts are the smallest and the largest there are, one party's beside the other's."""
    alone, book = Alone({}), Book({})
    if edges:
        for role, party in alone.parties.items():
            party.pair.draw = lambda part, role=role: edge(part, 1 + 2 * (role is Role.CLIENT))  # type: ignore[method-assign, misc]
    alone.begin_pass(kinds)
    counted = alone.preprocess()
    assert (counted["payload"], counted["rounds"]) == alone.predicted[0]
    for name, kind in enumerate(kinds, 1):
        taken = {role: alone.ends[role].take(kind) for role in Role}
        assert holds(kind, book, taken, name, near=True)


def edge(part: Part, step: int) -> Tensor:
    """0, 1, the largest, the middle and its neighbours, over and over; each place of one party's meets all of the other's."""
    half = 1 << part.bits - 1
    values = torch.tensor([0, 1, -1, half if half < 1 << 63 else -half, half - 1, half >> 1, -2])
    return part.reduce(values[torch.arange(part.count) // step % len(values)].reshape(part.shape))


MANY = 4000
UNIFORM = [
    (Mask((1, MANY), 21), Mask((1, 1), 10), exp.ExpMask(1, 2, (1, MANY), 11, (MANY, 1, 0))),
    (Mask((1, MANY), 21), exp.ExpMask(1, 0, (1, MANY), 0, (), 46, 13)),
    (Mask((MANY,), Tables(2).bits(16)), ReciprocalMask(1, (MANY,), 16, 2, 50)),
    (Mask((MANY,), PRODUCT_BITS), PiecesMask(1, (MANY,), 7)),
]


@pytest.mark.parametrize("kinds", UNIFORM, ids=lambda kinds: type(kinds[-1]).__name__)
def test_shares_are_uniform_at_each_party(kinds: Sequence[Kind]) -> None:
    """Each bit of each share is one in half of the elements, within seven standard deviations; with real transfers."""
    alone = Alone({}, transfers=Transfers)
    alone.begin_pass(kinds)
    alone.preprocess()
    for end in alone.ends.values():
        correlation = [end.take(each) for each in kinds][-1]
        for share, part in zip(correlation.shares, kinds[-1].shared_parts(), strict=True):
            flat = share.movedim(part.shape.index(MANY), 0).reshape(MANY, -1)
            ones = ((flat[..., None] >> torch.arange(part.bits)) & 1).double().mean(0)
            assert float((ones - 0.5).abs().max()) < 7 * 0.5 / MANY**0.5


def difference_program(d: Tensor, exact: Tensor) -> Tensor:
    """The error of the exponential of integers d (H, N), 12 fraction bits, by two parties alone."""
    rows = Rows(d.shape[1], 1, 0)
    m = uniform(d.shape[0], 1, bits=10)

    def protocol(party: Party) -> Protocol_[Shares]:
        w, top = yield from open_masked(party, [input_of(party, d + (m << 11), 21, 12), input_of(party, m, 10, 1)])
        return (yield from exp.exponential(party, w, top, rows, 11))

    return alone_value(protocol) - exact


def alone_value(protocol: object) -> Tensor:
    made: list[Alone] = []

    def source(weights: object, device: str) -> Alone:
        made.append(Alone(weights, device))  # type: ignore[arg-type]
        return made[0]

    outcome = Session(source=source).run(lambda party: party.run(protocol(party)))  # type: ignore[operator]
    assert (outcome.counted["offline"]["payload"], outcome.counted["offline"]["rounds"]) == made[0].predicted[0]
    return outcome.value()


def test_the_exponential_is_within_its_bound_and_right_on_average() -> None:
    low, high = -244 << 12, (1 << 11) - 1
    d = torch.cat([torch.randint(low, high + 1, (4, 5000)), torch.randint(-16 << 12, high + 1, (4, 20000))], -1)
    d[:, :8] = torch.tensor([low, low + 1, high, high - 1, 0, -1, -(4 << 12), 4 << 9])
    error = difference_program(d, reference.exponential(d / 2.0**12))
    assert (error.abs() <= reference.exponential_bound(d / 2.0**12) + 2.0**-16).all()
    assert error.abs().max() < 1.4e-4
    small = torch.full((1, 20000), -40 << 12)
    error = difference_program(small, reference.exponential(small / 2.0**12))
    assert abs(error.mean()) < 2e-7 + 6 * float(error.std()) / 20000**0.5


def test_an_exponential_without_a_maximum() -> None:
    d, window = torch.randint(-16 << 12, 0, (2, 8000)), exp.Window.saturating(24, 60)

    def protocol(party: Party) -> Protocol_[Shares]:
        (wire,) = yield from open_masked(party, [input_of(party, d, 21, 12)])
        return (yield from exp.exponential(party, wire, None, Rows(8000, 2, 0), 0, window=window))

    exact = reference.exponential(d / 2.0**12)
    error = alone_value(protocol) / 2.0**8 - exact
    assert (error.abs() <= 5.7e-5 * exact + 3.2e-5 * 2.0**-8).all()


def test_the_reciprocal_is_within_its_bound() -> None:
    s = torch.cat([0.55 + torch.rand(500) * 211, torch.exp(torch.rand(500) * 5.9) * 0.55, torch.tensor([0.55, 62 / 64, 1.0, 63 / 64])])
    exact = torch.round(s.double() * 2**16)[None] / 2.0**16

    def protocol(party: Party) -> Protocol_[Shares]:
        return (yield from reciprocal(party, input_of(party, exact, 44, 16), bound=212.5, bits=40, frac=20))

    error = alone_value(protocol) - reference.reciprocal(exact)
    assert (error.abs() <= reference.reciprocal_bound(exact, 20)).all()
