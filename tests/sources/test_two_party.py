"""The source `two_party`: every kind is made right by both parties alone, for what was predicted, and given once."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols.comparison import BitMask, CompareMask
from protocols.correlations import Kind, Mask, Role
from protocols.errors import CorrelationError
from protocols.lattice.lattice import Lattice
from protocols.linear import Weight
from protocols.ot.transfers import Transfers
from protocols.product import MatmulMask, MatrixTimesRowsMask
from protocols.rows import Rows
from protocols.sources.two_party import source
from protocols.truncation import OrMask
from tests.protocols.test_sources import Book, holds
from tests.support.alone import Alone, sealed
from tests.support.every_kind import asked, weights
from tests.support.ladder import IDS, LADDER, LOGIT_ERROR, float_logits, make, walker
from tests.support.plain_transfers import PlainTransfers
from tests.support.two_party import Weights, uniform


def drawn(n: int) -> dict[str, tuple[Weight, Tensor]]:
    return {name: (weight, uniform(*weight.shape, bits=20)) for name, weight in weights(n).items()}


@pytest.mark.parametrize(("n", "transfers"), [(4, PlainTransfers), (9, PlainTransfers), (4, Transfers)])
def test_every_kind_is_made_by_the_two_alone(n: int, transfers: Any) -> None:
    made = drawn(n)
    kinds = asked(n)
    alone, book, seen = Alone(made, transfers=transfers), Book({name: -tensor for name, (_, tensor) in made.items()}), set()
    alone.begin_pass(kinds)
    counted = alone.preprocess()
    assert (counted["payload"], counted["rounds"]) == alone.predicted[0]
    for name, kind in enumerate(kinds, 1):
        taken = {role: alone.ends[role].take(kind) for role in Role}
        assert holds(kind, book, taken, name, near=True), kind
        seen.add(type(kind).__name__)
    for end in alone.ends.values():
        end.end_pass()
    assert seen == {type(kind).__name__ for kind in kinds}


def test_masks_of_cached_wires_outlive_their_pass_and_the_next_pass_is_made_while_one_is_taken() -> None:
    """Keys and values of three passes; what is kept is named by later ones, at both parties."""
    alone, heads, width = Alone({}), 2, 3
    book, taken, done = Book({}), deque[list[Kind]](), list[int]()
    keys: list[int] = []

    def take() -> None:
        for kind in taken.popleft():
            name = alone.parties[Role.SERVER].next_name
            assert holds(kind, book, {role: alone.ends[role].take(kind) for role in Role}, name), kind
        for end in alone.ends.values():
            end.end_pass()

    for new in (4, 1, 2):
        first = alone.parties[Role.SERVER].pass_name
        done.append(new)
        total, keys = sum(done), [*keys, first + 1]
        rows = (total - new + 1, new, 1)
        count = Rows(*rows).count
        query, key = Mask((heads, new, width), 33), Mask((heads, new, width), 33, 1)
        alone.begin_pass([query, key, MatrixTimesRowsMask(first, tuple(keys), (heads, count), 33, rows=rows)])
        alone.preprocess()
        taken.append([query, key, MatrixTimesRowsMask(first, tuple(keys), (heads, count), 33, rows=rows)])
        if len(taken) > 1:
            take()
    take()
    for party in alone.parties.values():
        assert sorted(party.pair.masks) == keys
        party.forget()
    with pytest.raises(CorrelationError, match="does not exist"):
        alone.begin_pass([MatmulMask(first, tuple(keys), (heads, 1, 1), 33)])


def test_what_is_made_is_given_once_and_a_pass_that_failed_half_way_never() -> None:
    alone, kinds = Alone({}), [OrMask((3,), 5), OrMask((2,), 5)]
    alone.begin_pass(kinds)
    alone.preprocess()
    end = alone.parties[Role.CLIENT]
    assert end.take(kinds[0]).shares[0].shape == (3,)
    end.next_name = 1
    with pytest.raises(CorrelationError, match="is spent"):
        end.take(kinds[0])
    with pytest.raises(CorrelationError, match="before all of it was taken"):
        end.end_pass()
    other = Alone({}).parties[Role.CLIENT]
    other.begin_pass(kinds)
    protocol = other.preprocess()
    next(protocol)
    protocol.close()  # the peer is gone
    for attempt in (lambda: other.take(kinds[0]), lambda: other.begin_pass(kinds)):
        with pytest.raises(CorrelationError, match="not made to its end"):
            attempt()


def test_what_is_handed_over_is_gone() -> None:
    alone, kinds = Alone({}), [Mask((2,), 9), OrMask((2,), 5)]
    alone.begin_pass(kinds)
    alone.preprocess()
    found = {role: party.hand_over() for role, party in alone.parties.items()}
    assert [c.name for c in found[Role.SERVER]] == [1, 2] and holds(kinds[1], Book({}), {role: found[role][1] for role in Role}, 2)
    for party in alone.parties.values():
        assert party.next_name == 3 and party.hand_over() == []


def test_makers_run_in_a_window_as_they_do_side_by_side() -> None:
    """More rounds, the same values' relations; both as predicted."""
    kinds = [Mask((50,), 20), CompareMask(1, (50,), (50,), 20), *(OrMask((50,), 7) for _ in range(5)), BitMask(2, 1, (50,), 20, (50,))]
    rounds = []
    for window in (1, 1 << 20):
        alone, book = Alone({}, window=window), Book({})
        alone.begin_pass(kinds)
        counted = alone.preprocess()
        assert (counted["payload"], counted["rounds"]) == alone.predicted[0]
        rounds.append(counted["rounds"])
        for name, kind in enumerate(kinds, 1):
            assert holds(kind, book, {role: alone.ends[role].take(kind) for role in Role}, name)
    assert rounds[0] > rounds[1]


def test_both_ends_weigh_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A party's own part is of another size than its peer's; what a window admits, and so every round, must not hang on the role."""
    monkeypatch.setattr(source, "AT_ONCE", 0)
    kinds, alone = asked(4), Alone({})
    told = {role: [(task.name, task.weight) for task in end._tasks(list(enumerate(kinds, 1)))] for role, end in alone.parties.items()}
    assert told[Role.SERVER] == told[Role.CLIENT] and all(weight for _, weight in told[Role.CLIENT])
    sizes = [[sum(part.count for part in kind.own_parts(role)) for kind in kinds] for role in Role]
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("kind", [OrMask((4000,), 9), CompareMask(1, (4000,), (4000,), 11), BitMask(2, 0, (4000,), 5)])
def test_shares_are_uniform_at_each_party(kind: Kind) -> None:
    """Each bit of each share is one in half of the elements, within six standard deviations."""
    kinds = [Mask((4000,), 11), CompareMask(1, (4000,), (4000,), 11), kind] if kind != OrMask((4000,), 9) else [kind]
    alone = Alone({}, transfers=Transfers)
    alone.begin_pass(kinds)
    alone.preprocess()
    for end in alone.ends.values():
        correlation = [end.take(each) for each in kinds][-1]
        for share, part in zip(correlation.shares, kind.shared_parts(), strict=True):
            ones = ((share[..., None] >> torch.arange(part.bits)) & 1).double().mean(0)
            assert float((ones - 0.5).abs().max()) < 6 * 0.5 / 4000**0.5


@pytest.mark.parametrize("variant", LADDER)
def test_the_ladder_runs_by_the_two_alone(tmp_path: Path, variant: str) -> None:
    """Right, and for exactly what was predicted; the second of two passes too."""
    lowered, model = make(tmp_path, variant, n_layer=2 if "_i" in variant else 1)
    sources = list[Alone]()

    def source(weights: Weights, device: str) -> Alone:
        sources.append(Alone(weights, device))
        return sources[-1]

    by_two = walker(lowered, source=source)
    for ids in (IDS, IDS[:1]):
        found, exact = by_two(ids), float_logits(model, ids)
        assert float((found.client.reshape(-1) - exact).abs().max()) < LOGIT_ERROR
        assert found.dealt == b""
        made = sources[0].predicted[-1]
        assert found.counted["online"]["payload"] == found.predicted.online_bytes
        assert found.counted["offline"]["payload"] == made.bytes + found.predicted.peer_offline_bytes
        assert made.rounds <= 60


def test_a_network_runs_by_real_transfers_and_ciphertexts(tmp_path: Path) -> None:
    """Two passes, a longer and a short one."""
    lowered, model = make(tmp_path, "SM+ScFuFFN", n_layer=1, vocab_size=101)
    sources = list[Alone]()

    def source(weights: Weights, device: str) -> Alone:
        sources.append(Alone(weights, device, Transfers, Lattice, held=sealed))
        return sources[-1]

    by_two = walker(lowered, source=source)
    for ids in ((5, 7, 100, 11), (3,)):
        found, exact = by_two(ids), float_logits(model, ids)
        assert float((found.client.reshape(-1) - exact).abs().max()) < LOGIT_ERROR
        assert found.counted["online"]["payload"] == found.predicted.online_bytes
        assert found.counted["offline"]["payload"] == sources[0].predicted[-1].bytes + found.predicted.peer_offline_bytes
