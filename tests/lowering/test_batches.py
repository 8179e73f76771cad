"""Several sequences in one pass: what each one's output is, whoever else is there; rounds of one, bytes as predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from privinf.graph.batch import Batch
from privinf.graph.private import Runtime, encode_weights, weights_of
from privinf.lowering.program import next_token
from protocols.party import Party
from tests.support.alone import Alone
from tests.support.batches import Batches
from tests.support.ladder import LOGIT_ERROR, make
from tests.support.two_party import Dealt, Outcome, Session, offline_walk

FIRST = {0: [5, 7, 200, 11, 3], 1: [9], 2: [3, 3, 9, 100, 42, 17, 0, 96]}


@pytest.mark.parametrize(
    ("variant", "source", "fills"),
    [("SM+LN+G", Dealt, 0), ("SM(t)+ScFuFFN", Dealt, 0), ("SM(t)+ScFuFFN", Alone, 0), ("SM+LN+G", Dealt, 16), ("SM(t)+ScFuFFN", Dealt, 12)],
)
def test_each_sequence_has_its_own_output(tmp_path: Path, variant: str, source: Any, fills: int) -> None:
    """Prompts of several lengths, tokens after them, one that ends, one that waits, one that comes: float's logits, each."""
    lowered, model = make(tmp_path, variant)
    batches, so_far = Batches(lowered, source=source, fills=fills), {number: list(ids) for number, ids in FIRST.items()}

    def check(found: Outcome, new: dict[int, list[int]]) -> None:
        assert found.predicted.online_bytes == found.counted["online"]["payload"]
        assert found.predicted.rounds == found.counted["online"]["rounds"]
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([so_far[number]]))[0, -1] for number in new])
        assert float((found.client - expected).abs().max()) < LOGIT_ERROR

    check(batches.step(FIRST, logits=True), FIRST)
    steps: list[tuple[dict[int, list[int]], list[int]]] = [
        ({0: [4], 1: [8], 2: [15]}, []),
        *([({0: [1], 1: [2], 2: [3]}, [])] if fills else []),
        ({2: [1], 0: [2]}, []),
        ({0: [7], 1: [6, 5]}, [2]),
        *([({0: [11], 1: [12]}, []), ({0: [13], 1: [14]}, []), ({1: [2]}, []), ({1: [3]}, []), ({0: [5]}, [])] if fills else []),
        ({2: [9, 9, 1], 0: [3]}, []),
        ({5: [16, 23]}, [0, 1, 2]),
    ]
    for new, ended in steps:
        for number, ids in new.items():
            so_far[number] = (so_far[number] if number in so_far and not (number == 2 and len(ids) == 3) else []) + ids
        check(batches.step(new, ended=ended, logits=True), new)


def test_rounds_are_those_of_one(tmp_path: Path) -> None:
    """A token of each of four sequences takes no more rounds than a token of the longest."""
    lowered, _ = make(tmp_path, "SM(t)+ScFuFFN")
    batches = Batches(lowered)
    batches.step({number: [1] * (number + 3) for number in range(4)})
    together = batches.step({number: [2] for number in range(4)})
    alone = Batches(lowered)
    alone.step({0: [1] * 6})
    one = alone.step({0: [2]})
    assert together.counted["online"]["rounds"] == one.counted["online"]["rounds"]
    assert together.counted["online"]["payload"] <= 4 * one.counted["online"]["payload"] + 64
    assert together.client.shape == (4,)


def test_a_batch_of_one_costs_what_one_costs(tmp_path: Path) -> None:
    """Bytes and rounds of a pass over one sequence are the same either way."""
    lowered, _ = make(tmp_path, "SM(t)+ScFuFFN")
    found = Batches(lowered).step({3: [1, 2, 3]})
    graph, encoded = lowered.graph, encode_weights(lowered.graph)
    weights = {name: (record, encoded[name]) for name, (record, _, _) in weights_of(graph).items()}

    def program(party: Party) -> Tensor | None:
        ids = torch.tensor([[1, 2, 3]])
        known = not party.is_server and not offline_walk(party)
        return next_token(graph, Runtime.of(graph, party), ids if known else ids.to("meta"), logits=False)

    one = Session(weights).run(program)
    assert found.predicted == one.predicted and torch.equal(found.client, one.client)


def test_rows_are_filled_up_alike() -> None:
    """Where all have one token more: as many as the longest lacks. Whoever lies in such rows stays there."""
    batch = Batch({7: 20, 3: 30}, ((7, 1), (3, 1)), fills=64)
    assert batch.columns == (22, 32) and batch.starts == (0, 22) and not batch.settled
    assert [size for which, _, size in batch.segments if which == 0] == [20, 1, 30, 1] and len(batch.segments) == 6
    after = batch.step([(7, 1), (3, 1)], fills=64)
    assert after.settled and after.places == (21, 22 + 31) and after.starts == batch.starts
    last = after.step([(7, 1), (3, 1)], fills=64)
    assert last.columns == (54, 64) and not last.settled and last.segments[0] == (0, 0, 22) and (0, 22, 32) in last.segments
    assert not last.step([(3, 1)], [7], fills=64).settled and not last.step([(3, 1), (7, 1)], fills=64).columns
    waits = last.step([(3, 1)], fills=64)
    assert waits.settled and waits.columns == (64,) and waits.starts == (54,) and waits.places == (54 + 33,) and waits.shape == (-54, 64)
    alone = waits.step([(7, 1)], fills=64)
    assert alone.columns == (32,) and not alone.settled and alone.segments[-1] == (0, 54, 1) and alone.shape == (32, -64)
    assert last.step([(7, 1), (3, 1)]).segments == [(0, 0, 23), (1, 0, 1), (0, 54, 33), (1, 1, 1)]
    prompts = Batch({}, ((7, 20), (3, 30)), fills=64)
    assert not prompts.columns and prompts.starts == (0, 22) and [size for *_, size in prompts.segments] == [20, 1, 1, 30, 1, 1]
    assert prompts.step([(7, 1), (3, 1)], fills=64).settled, "the next token finds its rows"
    joined = after.step([(7, 1), (3, 1), (5, 4)], fills=64)
    assert not joined.columns and joined.step([(number, 1) for number in (7, 3, 5)], fills=64).settled
    assert Batch({}, ((7, 64),), fills=64).segments == [(1, 0, 64)], "nothing comes after a full context"
    assert Batch({1: 3}, ((1, 1), (2, 1)), fills=64).columns == () and Batch({1: 3}, ((1, 1),), fills=4).columns == (4,)


def test_who_waits_keeps_its_place() -> None:
    """What is cached after a pass: whoever was there and has not ended, with the new rows behind its own."""
    batch = Batch({7: 2, 3: 4}, ((3, 1), (9, 2)), frozenset())
    assert batch.after == {7: 2, 3: 5, 9: 2}
    assert batch.segments == [(0, 0, 6), (1, 0, 3)] and batch.starts == (2, 7)
    assert batch.step([(9, 1)], [7]).segments == [(0, 2, 7), (1, 0, 1)]
    assert batch.windows() == [(4, 5), (0, 2)] and batch.lasts == [0, 2]
    assert list(batch.layout(last=False).lengths) == [5, 1, 2] and list(batch.layout(last=True).lengths) == [5, 2]
