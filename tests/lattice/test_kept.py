"""Products with operands that grow: what is there is not sent again, and every product is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from privinf.lowering.joint import Joint
from protocols.correlations import Role
from protocols.lattice import kept, lattice
from protocols.lattice.lattice import Lattice
from protocols.lattice.lines import Joined, Line
from protocols.ring import blank
from tests.lattice.test_matmul import exact
from tests.lattice.two_ends import ROLES, Clear, Run, drawn, run, trace

S, C = ROLES
BITS = 30


class Cache:
    """Two lines, of 8 and 4 heads, whose pieces are columns (axis -1) or rows (-2); both ends, and what each product must be."""

    def __init__(self, axis: int, holder: Role, seed: int) -> None:
        self.axis, self.holder, self.generator = axis, holder, np.random.default_rng(seed)
        self.ends = {role: Lattice(role, Clear(role)) for role in ROLES}
        self.pieces: list[Tensor] = []
        self.names: list[tuple[int, int]] = []

    def grow(self, size: int) -> None:
        self.pieces.append(drawn(self.generator, (12, 40, size) if self.axis == -1 else (12, size, 24), BITS))
        self.names.append((2 * len(self.names) + 1, 2 * len(self.names) + 2))

    def lines(self, of: tuple[int, ...] = (0, 1)) -> list[Line]:
        sizes = tuple(piece.shape[self.axis] for piece in self.pieces)
        return [Line(tuple(names[k] for names in self.names), sizes, (8, 4)[k]) for k in of]

    def program(self, end: Lattice, role: Role, left: Tensor, right: Tensor, need: Tensor | None, lines: list[Line]) -> Iterator[Any]:
        own = (blank(*left.shape), right) if role is self.holder else (left, blank(*right.shape))
        return end.matmul(self.holder, *own, BITS, need, Joined(self.axis, lines))

    def product(self, rows: int, of: tuple[int, ...] = (0, 1), masked: bool = False) -> Run:
        heads = slice(0, 8) if of == (0,) else slice(8, 12) if of == (1,) else slice(0, 12)
        right = torch.cat(self.pieces, self.axis)[heads]
        left = drawn(self.generator, (right.shape[0], rows, right.shape[1]), BITS)
        need = torch.arange(right.shape[2]) <= torch.arange(rows)[:, None] + right.shape[2] - rows if masked else None
        lines = self.lines(of)
        blanks = blank(*left.shape), blank(*right.shape)
        predicted = trace(self.ends[C].trace().matmul(self.holder, *blanks, BITS, need, Joined(self.axis, lines)))
        found = run(lambda role: self.program(self.ends[role], role, left, right, need, lines))
        assert (found.sent, found.rounds) == predicted[:2]
        wrong = (found.results[S] + found.results[C]) % (1 << BITS) != exact(left, right, BITS)
        assert not (wrong & need if need is not None else wrong).any()
        return found


@pytest.fixture
def goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is used, however little it is."""
    monkeypatch.setattr(lattice, "dearer", lambda *_: False)


@pytest.mark.parametrize("axis", [-1, -2])
def test_little_is_laid_out_anew(axis: int) -> None:
    cache = Cache(axis, S, 8)
    for size in (8, 1, 1):
        cache.grow(size)
        cache.product(size)
    assert [entry.size for entry in {id(entry): entry for entry, _ in cache.ends[C]._kept._at.values()}.values()] == [10]


@pytest.mark.parametrize("holder", ROLES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.usefixtures("goes_on")
def test_what_is_there_is_not_sent_again(axis: int, holder: Role) -> None:
    cache = Cache(axis, holder, 3)
    cache.grow(20)
    first = cache.product(20, masked=axis == -1)
    sent = []
    for size in (1, 1, 3, 1):
        cache.grow(size)
        sent.append(cache.product(size, masked=axis == -1).sent[holder])
    again = cache.product(1)
    assert sent[-1] < first.sent[holder] and again.sent[holder] < sent[-1] / 4, "nothing is new, and nothing is sealed"
    cache.grow(12)
    cache.product(12)
    cache.grow(1)
    cache.product(1)
    assert len({id(entry) for entry, _ in cache.ends[C]._kept._at.values()}) == 4


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.usefixtures("goes_on")
def test_lines_that_begin_apart_go_on_together(axis: int) -> None:
    cache = Cache(axis, S, 4)
    cache.grow(16)
    cache.product(16, (0,))
    cache.product(16, (1,))
    for _ in range(2):
        cache.grow(1)
        cache.product(1)
    assert len({id(entry) for entry, _ in cache.ends[S]._kept._at.values()}) == 3


@pytest.mark.usefixtures("goes_on")
def test_a_line_that_was_not_kept_goes_on_with_the_others() -> None:
    cache = Cache(-1, S, 7)
    cache.grow(16)
    cache.product(16, (0,))
    for size in (1, 1, 2):
        cache.grow(size)
        cache.product(1)
    sizes = sorted(entry.size for entry in {id(entry): entry for entry, _ in cache.ends[S]._kept._at.values()}.values())
    assert sizes == [1, 3, 16, 17], "the one line's, the other's with its first new column, and what they have in common"


def test_an_end_apart_has_other_operands_of_these_names() -> None:
    first = Cache(-1, S, 9)
    second = Cache(-1, S, 10)
    second.ends = {role: end.apart() for role, end in first.ends.items()}
    for cache in (first, second, first):
        cache.grow(16)
        cache.product(16)
    joint = Joint(S, {}, traced=True)
    ends: list[Any] = [source._behind.lattice for source in (joint.source, joint.apart(), joint.apart())]
    assert len({id(end._kept) for end in ends}) == 3 and len({id(end._keys) for end in ends}) == 1


def test_lines_that_fit_no_chunk_are_sent_anew() -> None:
    cache = Cache(-1, S, 5)
    cache.grow(16)
    whole = cache.product(16).sent[S]
    assert cache.product(16, (1,)).sent[S] > whole / 8, "a part of what was laid out together cannot be answered alone"
    cache.product(16)


@pytest.mark.usefixtures("goes_on")
def test_a_chunk_that_is_full_begins_another_and_too_many_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    kept.growing.cache_clear()
    monkeypatch.setattr(kept, "ROOM", 3)
    cache = Cache(-2, C, 6)
    cache.grow(16)
    cache.product(2)
    for _ in range(5):
        cache.grow(1)
        cache.product(1)
    entries = {id(entry): entry for entry, _ in cache.ends[S]._kept._at.values()}
    assert sorted(entry.size for entry in entries.values()) == [2, 3, 16]
    monkeypatch.setattr(kept, "MOST", 1)
    cache.grow(2)
    cache.product(1)
    assert len({id(entry) for entry, _ in cache.ends[S]._kept._at.values()}) == 1
    cache.product(1)
    kept.growing.cache_clear()
