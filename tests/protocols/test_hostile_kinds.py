"""Every kind with hostile fields: a dealer answers in one line before it has made anything, or deals what it said that it would.

The kinds are those of the registry, each taken from a program that asks for it; one that no program asks for is noticed.
"""

from __future__ import annotations

import functools
import itertools
import tracemalloc
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from protocols import correlations as c
from protocols import kernels
from protocols.correlations import FIELDS, Kind, from_wire
from protocols.errors import CorrelationError
from protocols.matrix import MEASURED_ROWS, _direct_is_faster
from protocols.prg import Prg
from protocols.rows import _layouts
from protocols.sources.dealer import ELEMENT, Dealer
from protocols.sources.fitting import Sketch, _parts_held
from tests.support.allocations import watched
from tests.support.every_kind import asked, masks

MEMORY = 4 * 2**20
SMALL = 2**19  # what a refusal may take: its text, its traceback


def dealer_of(n: int, memory: int = MEMORY) -> Dealer:
    return Dealer(bytes(16), bytes(range(16)), masks(n), memory=memory)


@functools.cache
def places() -> dict[str, int]:
    """Where each kind first stands."""
    found: dict[str, int] = {}
    for place, kind in enumerate(asked(4)):
        found.setdefault(type(kind).__name__, place)
    return found


def test_every_kind_is_asked_for() -> None:
    assert set(places()) == set(Kind.registry)


# ---- hostile fields

HUGE = 2**31 - 1
NUMBERS = [-1, 0, 1, 2, 3, 7, 63, 64, 65, 1000, 2**20, HUGE, 2**31, 2**63]
LISTS: list[list[int]] = [
    [],
    [0],
    [1],
    [1, 1, 1],
    [2, 5],
    [1, HUGE, 0],
    [HUGE, 1, 1],
    [1, 2**16, 1],
    [1, 2**22, 0],
    [0, HUGE, 0],
    [2**11] * 2,
]
LISTS += [[1] * 8, [1] * 9, [HUGE] * 8, [-1, 2], [1] * 70000, [2**20, 1], [1, 2**20]]
TEXTS = ["", "s", "w", "x" * 10**6]


def fields_of(name: str) -> list[tuple[str, list[Any]]]:
    """Each field of a kind and what may stand in it that should not, its list's parts grown, shrunk and turned round included."""
    hints, kind = typing.get_type_hints(Kind.registry[name], include_extras=True), asked(4)[places()[name]]
    found = []
    for field in Kind.registry[name].__struct_fields__:
        assert hints[field] in FIELDS
        honest = getattr(kind, field)
        if hints[field] == c.Text:
            found.append((field, TEXTS))
        elif isinstance(honest, tuple):
            near = [list(honest[::-1]), [*honest, 1], list(honest[1:])]
            near += [[*honest[:k], other, *honest[k + 1 :]] for k, size in enumerate(honest) for other in (0, 1, size + 1, 2**22)]
            found.append((field, LISTS + near))
        else:
            names = [place + 1 for place in range(places()[name])]  # of all masks before it, and of what is no mask
            found.append((field, [*NUMBERS, honest + 1, honest - 1, *names]))
    return found


def wrong(name: str, number: int) -> Iterator[dict[str, Any]]:
    fields = fields_of(name)
    if number == 1:
        yield from ({field: value} for field, values in fields for value in values)
        return
    for (a, left), (b, right) in itertools.combinations(fields, 2):
        yield from ({a: x, b: y} for x, y in itertools.product(left[:: 1 + len(left) // 9], right[:: 1 + len(right) // 9]))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", sorted(Kind.registry))
def test_hostile_fields(name: str, number: int) -> None:
    """One line and nothing made, or exactly what the kind says, within the bound."""
    kinds, place = asked(4), places()[name]
    dealer = dealer_of(4)
    for kind in kinds[:place]:
        dealer.deal(kind)
    before, refused = dealer.next_name, 0
    tracemalloc.start(1)
    try:
        for values in wrong(name, number):
            honest = msgspec.structs.asdict(kinds[place])
            try:
                encoded = msgspec.msgpack.encode([name, *(honest | values).values()])
            except OverflowError:
                continue
            with watched() as held:
                try:
                    kind = from_wire(encoded)
                    assert len(dealer.deal(kind)) == kind.shared_bytes
                except CorrelationError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400
                    assert held() < SMALL + 10 * len(encoded), (values, held())
                    assert dealer.next_name == before
                    refused += 1
                else:
                    assert held() <= MEMORY, (values, held())
                    dealer.rewind(before)
                    dealer._masks.pop(before, None)
    finally:
        tracemalloc.stop()
    assert refused > 10


def test_what_a_kind_says_of_its_memory_holds() -> None:
    """Each is dealt within what it declared, so that the bound is of what is there."""
    if kernels.fast is not None:
        for of in itertools.product((torch.int32, torch.int64), MEASURED_ROWS, (False, True)):
            _direct_is_faster(*of)  # which is measured once, with memory of its own
    n, small = 48, 2**14
    dealer = dealer_of(n, 2**33)
    for kind in asked(n):
        fit, drawn = Sketch(dealer)._fit(kind), Prg(bytes(16)).stream(1)
        own, client, shares = (
            [drawn.uniform(part.shape, part.bits) for part in parts]
            for parts in (kind.server_parts(), kind.client_parts(), kind.shared_parts())
        )
        _layouts.clear()
        with watched() as held:
            kind.relation(dealer, own, client, shares)
        assert held() <= ELEMENT * fit.held + small, (kind, held() / ELEMENT, fit.held)
        with watched() as held:
            dealer.deal(kind)
        assert held() <= ELEMENT * (fit.held + _parts_held(kind)) + small, kind
