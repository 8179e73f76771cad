"""Memory of recordings: the same bits in a fraction of it, tapes of one kind that know nothing of each other, and what waits."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols.arena import LINE, Arena, Moves, _placed
from protocols.recording import Recorder, replay
from protocols.ring import array
from protocols.sources.shelf import STEP, Shelf
from protocols.sources.strips import Places

SHAPE = (6, 40)


def program(x: Tensor, y: Tensor) -> Tensor:
    """Many values, of which a few are needed at a time; views, lists, bits, and what is changed in place."""
    held = torch.zeros(SHAPE, dtype=torch.int64)
    for turn in range(30):
        x, y = y + (x << 1), x - (y[:, torch.arange(39, -1, -1)] >> 2)
        held[:, turn] = ((x ^ y) * (y >= x) + (x == 5))[:, turn]
        x = torch.cat([x[:, 3:], torch.stack([y[:, 0], y[:, 5], (y < x).long()[:, 2]], 1)], 1)
    return (held + x.transpose(0, 1).reshape(SHAPE)).sum(-1, keepdim=True)


def recorded() -> tuple[Recorder, Tensor, Tensor, Tensor]:
    recorder, (x, y) = Recorder(), drawn(1)
    for given in (x, y):
        recorder.given(given)
    with torch.inference_mode(), recorder:
        out = program(x, y)
    assert not recorder.why
    return recorder, x, y, out


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-(1 << 62), 1 << 62, SHAPE, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_steps_do_the_same_in_a_fraction_of_the_memory() -> None:
    recorder, x, y, out = recorded()
    with torch.inference_mode():
        to = recorder.moves(recorder.steps, [array(each) for each in (x, y, out)])
        steps, own, result = to.steps(recorder.steps), (to.tensor(x), to.tensor(y)), to.tensor(out)
        assert to.arena.nbytes < recorder.bytes / 8 and result.data_ptr() != out.data_ptr()
        before = out.clone()
        for seed in (2, 3):
            for each, value in zip(own, drawn(seed), strict=True):
                each.copy_(value)
            replay(steps)
            assert torch.equal(result, program(*drawn(seed)))
            to.arena.clear()
            assert not result.any(), "values are gone"
            to.arena.release()
        assert torch.equal(out, before), "what was recorded is as it was"
        again = Moves.another(to.arena)
        others, another, last = again.steps(steps), [again.tensor(each) for each in own], again.tensor(result)
        for each, value in zip((*another, *own), (*drawn(4), *drawn(5)), strict=True):
            each.copy_(value)
        replay(others)
        assert torch.equal(last, program(*drawn(4))) and not result.any()
        replay(steps)
        assert torch.equal(last, program(*drawn(4))) and torch.equal(result, program(*drawn(5)))


def test_what_is_needed_at_a_time_lies_apart() -> None:
    chosen = random.Random(7)
    for _ in range(20):
        memory = np.zeros(1 << 16, np.uint8)
        start, at, pieces, arrays = memory.__array_interface__["data"][0], 0, [], []
        for size in (chosen.randrange(1, 900) for _ in range(60)):
            arrays.append(memory[at : at + size])
            pieces.append((start + at, start + at + size))
            at += size
        spans = [sorted((chosen.randrange(100), chosen.randrange(100))) for _ in pieces[:-3]]
        touched: list[list[Any]] = [[] for _ in range(100)]
        for piece, span in enumerate(spans):
            for number in span:
                touched[number].append([arrays[piece][1:]] if len(arrays[piece]) > 1 else arrays[piece])
        places, size = _placed(pieces, [(print, tuple(each)) for each in touched], [arrays[-3]])
        assert places[-2:] == [-1, -1], "what no step touches has no place"
        spans.append([0, 100])
        for one in range(len(spans)):
            assert places[one] % LINE == 0 and places[one] + len(arrays[one]) <= size
            for other in range(one):
                apart = spans[one][1] < spans[other][0] or spans[other][1] < spans[one][0]
                beside = places[one] + len(arrays[one]) <= places[other] or places[other] + len(arrays[other]) <= places[one]
                assert apart or beside


@pytest.mark.parametrize("places", [[3], [0, 4, 8], [1, 2], [0, 3, 8], [6, 2, 4], [5, 3, 1]])
def test_a_further_row_of_each_sequence_has_its_place(places: list[int]) -> None:
    rows = np.arange(2 * len(places) * 3).reshape(2, len(places), 3) + 1
    for further in (0, 2):
        out, want = np.zeros((2, 12, 3), np.int64), np.zeros((2, 12, 3), np.int64)
        Places(places).put(out, rows, further)
        for number, place in enumerate(places):
            want[:, place + further] = rows[:, number]
        assert (out == want).all()


class Taped(SimpleNamespace):
    """As little as a shelf needs."""

    def __init__(self, size: int, steps: int = 1) -> None:
        super().__init__(arena=Arena(size), bytes=size, steps=[(print, ())] * steps)

    def another(self) -> Taped:
        return Taped(self.bytes, len(self.steps))

    def wipe(self) -> None:
        self.arena.clear()

    __hash__ = object.__hash__


@pytest.fixture
def shelf() -> Shelf[str, Any]:
    return Shelf(20 * STEP, resident=10_000)


def test_one_writes_and_whoever_comes_later_gets_another(shelf: Shelf[str, Any]) -> None:
    assert shelf.take("one") is None and shelf.claim("one") and not shelf.claim("one") and shelf.claim("other")
    shelf.leave("one")
    assert shelf.claim("one")
    tape = Taped(4000)
    shelf.add("one", tape)
    found = shelf.take("one")
    assert found is not None and found is not tape and found.arena is not tape.arena
    shelf.give("one", tape)
    assert shelf.take("one") is tape and shelf.take("other") is None
    del tape, found
    assert shelf.take("one") is None, "nobody has one any more"


def test_what_waits_is_bounded(shelf: Shelf[str, Any]) -> None:
    tapes = [Taped(4000, 4) for _ in range(5)]
    for number, tape in enumerate(tapes):
        tape.arena.bytes[:] = 1
        shelf.give(str(number), tape)
        assert not tape.arena.bytes.any()
    assert [tape.arena.holds for tape in tapes] == [0, 0, 0, 4000, 4000], "memory goes back, the oldest's first"
    shelf.give("5", Taped(4000, 16))
    assert len(shelf) < 6 and shelf.take("5") is not None
