"""Further tokens by tapes: the very bits that a walk makes, with correlations of their own, and none where a walk cannot be replayed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import privinf.dealer.dealer
from privinf.client.conversation import Conversation
from privinf.client.shared import Shared
from privinf.dealer.dealer import DealerService
from privinf.graph.node import NODE_KINDS
from privinf.local.session import LocalSession
from privinf.lowering.explain import explain
from privinf.server import sketches
from privinf.server.sketches import Sketches
from privinf.session.messages import Pass
from privinf.session.options import Options
from privinf.session.replays import Replays, Tapes
from protocols import kernels
from protocols.comparison import CompareMask
from protocols.correlations import Mask, Role
from protocols.recording import Recorder, made, replay
from protocols.sources.dealer import Dealer, Store
from protocols.sources.dealing import DealtTape
from protocols.sources.tape import Tape
from protocols.sources.taping import DealtTapes
from tests.support import trio as t

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    kernels.load(None)
    if kernels.fast is None:
        pytest.skip(kernels.status())


class Watched:
    """What tapes have drawn, pass by pass, and under which names."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.drawn: dict[Role, list[Tensor]] = {role: [] for role in Role}
        self.names: dict[Role, list[range]] = {role: [] for role in Role}
        self.replayed = dict.fromkeys(Role, 0)
        self.dealt: list[tuple[Tensor, bytes]] = []
        take, walk, deal = Tape.take, Tape.walk, DealtTape.deal

        def watched(tape: Tape, store: Store) -> None:
            first = store.next_name
            take(tape, store)
            self.drawn[tape.role].append(tape.drawn.out.clone())
            self.names[tape.role].append(range(first, store.next_name))

        def walked(tape: Tape, *args: object) -> Tensor | None:
            self.replayed[tape.role] += 1
            return walk(tape, *args)  # type: ignore[arg-type]

        def dealt(tape: DealtTape, *args: object) -> dict[int, Tensor]:
            found = deal(tape, *args)  # type: ignore[arg-type]
            self.dealt.append((torch.cat([tape.server.out, tape.client.out]), tape.payload.tobytes()))
            return found

        patch.setattr(DealtTape, "deal", dealt)
        patch.setattr(Tape, "take", watched)
        patch.setattr(Tape, "walk", walked)


def seeded(patch: pytest.MonkeyPatch) -> None:
    """The dealer's seeds are the same in every test that asks for it."""
    count = itertools.count(1)
    patch.setattr(privinf.dealer.dealer, "new_seed", lambda: next(count).to_bytes(16, "big"))


def logits_of(cache: Path, tokens: int) -> tuple[list[Tensor], list[Tensor], dict[str, int]]:
    """The logits of two queries of one client, one after the other, and the payload and rounds of the second."""
    with t.trio(cache=cache) as parties:
        client, found = parties.client(), []
        for _ in range(2):
            list(client.generate(ids=PROMPT, max_new_tokens=tokens, ignore_eos=True, logits=True))
            found.append(client.logits)
        assert client.result is not None
        return found[0], found[1], client.result["traffic"]["online"]


def test_a_tape_makes_the_bits_of_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seeds: over two fillings of a row, in one session and in the next, which takes the tapes of the first."""
    with monkeypatch.context() as patch:
        seeded(patch)
        watched = Watched(patch)
        replayed = logits_of(tmp_path, 16)
    with monkeypatch.context() as patch:
        seeded(patch)
        patch.setattr(Tapes, "allowed", lambda tapes, program: False)
        patch.setattr(DealtTapes, "fits", lambda tapes, kinds: False)
        walked = logits_of(tmp_path, 16)
    for one, other in zip(replayed[:2], walked[:2], strict=True):
        assert len(one) == len(other) == 16 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    cost = explain(t.lowered(), len(PROMPT), new_tokens=16, logits=True)["total"]
    for counted in (replayed[2], walked[2]):
        assert (counted["payload"], counted["rounds"]) == (cost["online_bytes"], cost["rounds"])
    for role in Role:
        # of 15 further tokens 7 fill a row to 16 and 8 one to 32: the first two of the first session are written, and its ninth
        assert watched.replayed[role] >= 2 * 15 - 4, "so few were replayed that this says little"
    assert len(watched.dealt) >= 2 * 15 - 4


def several_of(cache: Path, tokens: int) -> list[list[list[float]]]:
    """The logits of the replies of two batches of one client, one after the other."""
    found = []
    with t.trio(cache=cache) as parties:
        client = parties.client()
        for _ in range(2):
            with client.generate(ids=[PROMPT, PROMPT[:3], PROMPT[2:]], max_new_tokens=tokens, ignore_eos=True, logits=True) as replies:
                list(replies)
                found += [result["logits"] for result in replies.results]
    return found


def test_a_tape_makes_the_bits_of_a_walk_over_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seeds: over two fillings of their rows, in one session and in the next."""
    with monkeypatch.context() as patch:
        seeded(patch)
        watched = Watched(patch)
        replayed = several_of(tmp_path, 16)
    with monkeypatch.context() as patch:
        seeded(patch)
        patch.setattr(Tapes, "allowed", lambda tapes, program: False)
        patch.setattr(DealtTapes, "fits", lambda tapes, kinds: False)
        assert replayed == several_of(tmp_path, 16)
    assert len(replayed) == 6 and all(len(each) == 16 for each in replayed)
    for role in Role:
        # of 15 further tokens 7 fill rows to 16 and 8 to 32; the first of each is walked, and of the first batch three are written
        assert watched.replayed[role] >= 2 * 13 - 3, "so few were replayed that this says little"
    assert len(watched.dealt) >= 2 * 13 - 3


def test_whoever_leaves_a_batch_leaves_no_trace_in_a_tape(tmp_path: Path) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:]]
    with t.trio(cache=tmp_path) as parties:
        client = parties.client()
        for place in (1, 0):  # which one is dropped in the middle
            tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
            with client.generate(ids=prompts, max_new_tokens=14, ignore_eos=True) as replies:
                for placed in replies:
                    tokens[placed.which].append(placed.token.id)
                    if placed.which == place and len(tokens[place]) == 5:
                        replies.cancel(place)
            assert all(t.is_greedy(prompt, tokens[each]) for each, prompt in enumerate(prompts))
            assert [len(tokens[each]) for each in range(3) if each != place] == [14, 14]


def test_one_goes_on_while_another_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations that share a session: whoever is alone in its passes has tapes too, and who waited goes on where it was."""
    watched = Watched(monkeypatch)
    with t.trio(cache=tmp_path) as parties:
        shared = Shared(parties.client(), 4)
        with shared.seat().open() as one, shared.seat().open() as other:
            first = [token.id for token in one.generate(PROMPT, max_new_tokens=3, ignore_eos=True)]
            second = [token.id for token in other.generate(PROMPT[3:], max_new_tokens=12, ignore_eos=True)]
            third = [token.id for token in one.generate([7], max_new_tokens=6, ignore_eos=True)]
    assert t.is_greedy(PROMPT, first) and t.is_greedy(PROMPT[3:], second) and t.is_greedy([*PROMPT, *first, 7], third)
    assert all(watched.replayed[role] >= 5 for role in Role) and len(watched.dealt) >= 5


def test_who_is_through_waits_while_the_other_goes_on(tmp_path: Path) -> None:
    """Two replies in one session, the shorter of which ends in the middle of a row's filling: nothing is laid out anew for that."""
    with t.trio(cache=tmp_path) as parties, ThreadPoolExecutor(2) as pool:
        shared = Shared(parties.client(), 4)
        with shared.seat().open() as one, shared.seat().open() as other:
            for first, second in (([3, 1, 4], [1, 5, 9, 2]), ([6, 5], [3])):
                before = [[*seat.ids] for seat in (one, other)]
                asked = ((one, first, 4), (other, second, 9))
                made = [
                    pool.submit(lambda seat, ids, most: list(seat.generate(ids, max_new_tokens=most, ignore_eos=True)), *each)
                    for each in asked
                ]
                for past, (_, ids, _), reply in zip(before, asked, made, strict=True):
                    assert t.is_greedy([*past, *ids], [token.id for token in reply.result()])


def test_what_is_replayed_has_randomness_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with t.trio(cache=tmp_path) as parties:
        client = parties.client()
        list(client.generate(ids=PROMPT, max_new_tokens=12, ignore_eos=True))
    for role in Role:
        drawn, names = watched.drawn[role], watched.names[role]
        assert len(drawn) >= 10 and watched.replayed[role] >= 8
        for first, second in itertools.combinations(drawn, 2):
            same = (first == second).double().mean() if first.shape == second.shape else 0
            assert same < 0.75  # elements of a bit are the same half of the time
            assert not torch.equal(first[:64], second[:64])
        assert all(first.stop <= second.start for first, second in itertools.pairwise(names)), "a correlation's name came twice"
    assert len(watched.dealt) >= 7  # the first is dealt without a tape, two are written
    for (drawn_once, payload), (drawn_again, other) in itertools.combinations(watched.dealt, 2):
        assert not torch.equal(drawn_once[:64], drawn_again[:64])
        assert sum(a == b for a, b in zip(payload, other, strict=False)) < len(payload) / 32  # by chance one octet in 256 is the same


def test_a_pass_that_was_dealt_ahead_and_dropped_leaves_nothing_in_a_tape(tmp_path: Path) -> None:
    sequence: list[int] = []
    with t.trio(cache=tmp_path) as parties, Conversation(parties.client()) as conversation:
        for turn in ([1, 2, 3, 4, 5], [6, 7], [8], [9, 10]):  # what is dealt ahead of a turn is of one row, and its names are used anew
            tokens = [token.id for token in conversation.generate(turn, max_new_tokens=3, ignore_eos=True)]
            assert t.is_greedy([*sequence, *turn], tokens)
            sequence += [*turn, *tokens]


def test_each_way_that_passes_go_is_compared_by_itself() -> None:
    """Sizes make no other way; another kind, or one of other parts, does. Where two tapes of a way differ, none is used."""
    kinds = {"short": [Mask((3,), 20)], "long": [Mask((5,), 20)], "other": [Mask((3,), 20), CompareMask(1, (3,), (3,), 20)]}

    def told(value: int, why: str = "") -> Any:
        return SimpleNamespace(told=(value,), why=why)

    tapes, parties = DealtTapes(), Tapes()

    def written(of: str, value: int, position: int) -> bool:
        tape: Any = SimpleNamespace(kinds=kinds[of], bytes=1, offset=position, position=(position,))
        found = parties.written((len(of), False), tape, told(value))
        assert found == tapes.written(of.encode(), tape, told(value))
        return found

    made = [written("short", 1, 4), written("short", 1, 4), written("short", 1, 5), written("long", 2, 4)]
    assert made == [False, False, True, True], "two tapes at one position do not show what hangs on it"
    for agreed in (tapes.agreed, parties.agreed):
        assert agreed(kinds["short"]) and agreed(kinds["long"]) and not agreed(kinds["other"])
    assert [written("other", 3, 4), written("other", 4, 5), written("short", 1, 6)] == [False, False, False]
    assert not parties.allowed((False, False)) and parties.allowed((False, True))


def test_a_store_spends_a_pass_once(tmp_path: Path) -> None:
    """What was spent whole is gone from the store, and what was peeked at cannot be spent whole."""
    from protocols.errors import CorrelationError
    from protocols.sources.expansion import Whole

    kinds = [Mask((3,), 20), Mask((5,), 1)]
    store, drawn = Store(Role.SERVER, bytes(16)), Whole([kind.server_parts() for kind in kinds])
    store.spend(drawn, 0, b"")
    again = Store(Role.SERVER, bytes(16))
    assert all(torch.equal(whole[0], again.take(kind).own[0]) for whole, kind in zip(drawn.values, kinds, strict=True))
    assert store.next_name == again.next_name == 3
    before = drawn.out.clone()
    store.spend(drawn, 0, b"")
    assert not torch.equal(before, drawn.out)
    store.put(store.next_name, memoryview(b""))
    with pytest.raises(CorrelationError, match="spent whole"):
        store.spend(drawn, 0, b"")


# ---- what is written down


def program(x: Tensor, y: Tensor, further: int = 0) -> Tensor:
    """Operators that protocols use."""
    z = (x + y) * 3 - (x << 2) + (-(y >> 1)) ^ (x & 255) | (1 - x)
    held = torch.zeros(3, 4, dtype=torch.int64)
    held[:, 1:] = z[:, :3]
    picked = z[:, torch.tensor([2, 0, 1])].sum(-1, keepdim=True) + torch.cat([z, held], -1)[:, 5:6]
    return torch.stack([picked, (z < y).long()[:, :1]]).permute(1, 0, 2).reshape(-1) + torch.full((6,), 7)


def written(x: Tensor, y: Tensor, make: object = program, *, most: int = 1 << 40, **more: int) -> tuple[Recorder, Tensor]:
    recorder = Recorder(most=most)
    for given in (x, y):
        recorder.given(given)
    with torch.inference_mode(), recorder:
        out = make(x, y, **more)  # type: ignore[operator]
    return recorder, out


def inputs() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield tuple(torch.randint(-(1 << 62), 1 << 62, (3, 4), generator=generator) for _ in range(2))  # type: ignore[misc]


def test_what_is_too_large_is_not_kept_while_it_is_computed() -> None:
    x, y = next(inputs())
    want = program(x, y)
    recorder, found = written(x, y, most=1000)
    assert torch.equal(found, want) and recorder.why == "it makes more than 1000 bytes"
    assert not recorder.steps and not recorder.told
    recorder.note(print)
    recorder.given(x)
    assert not recorder.steps


def test_a_recording_computes_on_other_values() -> None:
    pairs = inputs()
    x, y = next(pairs)
    recorder, out = written(x, y)
    assert not recorder.why and torch.equal(out, program(x, y))
    for _ in range(3):
        one, other = next(pairs)
        x.copy_(one)
        y.copy_(other)
        with torch.inference_mode():
            replay(made(recorder.steps))
        assert torch.equal(out, program(one, other))


def test_two_recordings_tell_of_what_escapes_them() -> None:
    """The same program tells the same of other values; one that computes beside torch, or reads a public number that changes, does not."""
    pairs = inputs()
    assert written(*next(pairs))[0].told == written(*next(pairs))[0].told

    def beside(x: Tensor, y: Tensor) -> Tensor:
        return y + torch.from_numpy(x.numpy() ^ 5)

    assert written(*next(pairs), beside)[0].told != written(*next(pairs), beside)[0].told

    def public(x: Tensor, y: Tensor, further: int = 0) -> Tensor:
        return x + further

    assert written(*next(pairs), public)[0].told != written(*next(pairs), public, further=1)[0].told
    table = torch.arange(100)

    def moved(x: Tensor, y: Tensor, further: int = 0) -> Tensor:
        return x + table[further : further + 4]

    assert written(*next(pairs), moved)[0].told != written(*next(pairs), moved, further=1)[0].told
    assert written(*next(pairs), lambda x, y: x + int(y[0, 0]))[0].why and written(*next(pairs), lambda x, y: x[y > 0])[0].why


def test_a_program_that_two_recordings_tell_differently_has_no_tapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk whose position escapes is walked for every token, and its reply is right."""
    from privinf.ops.position_bias import PositionBias
    from protocols.opening import add_server_constant

    def run(node: PositionBias, x: object, *others: object) -> object:
        first, count = x.runtime.offset, x.shares.shape[1]  # type: ignore[attr-defined]
        rows = node.constant_of(x.runtime, "weight", x.shares.frac)  # type: ignore[attr-defined]
        return x.with_shares(add_server_constant(x.party, x.shares, None if rows is None else rows[first : first + count]))  # type: ignore[attr-defined]

    monkeypatch.setattr(PositionBias, "run", run)
    watched = Watched(monkeypatch)
    with t.trio(cache=tmp_path) as parties:
        tokens = [token.id for token in parties.client().generate(ids=PROMPT, max_new_tokens=9, ignore_eos=True)]
    assert watched.replayed[Role.SERVER] == 0 and t.is_greedy(PROMPT, tokens)


@pytest.mark.slow
def test_dumped_passes_are_walked(tmp_path: Path) -> None:
    """Of a local session whose shares are dumped, no pass is replayed: every node of every pass has its file."""
    directory = tmp_path / "dump"
    directory.mkdir()
    with LocalSession(t.lowered_directory(), Options(cache=tmp_path), dump=directory) as session:
        assert len(list(session.generate(ids=PROMPT, max_new_tokens=5, ignore_eos=True))) == 5
    for role in ("server", "client"):
        passes = [{path.name.split(".", 2)[2] for path in directory.glob(f"{number}.{role}.*")} for number in range(5)]
        assert passes[0] and len({frozenset(names) for names in passes}) == 1


# ---- passes that are not walked on shapes


def asked_of_the_dealer(cache: Path, patch: pytest.MonkeyPatch, tokens: int) -> tuple[list[str], list[int]]:
    """The server's messages about passes in a session, and its reply."""
    asked: list[str] = []
    read = DealerService._read
    further = Dealer.deal_further

    def told(service: DealerService, dealer: Dealer, request: Any) -> Any:
        asked.append(type(request).__name__)
        return read(service, dealer, request)

    def moved(dealer: Dealer) -> Any:
        asked.append("Further")
        return further(dealer)

    patch.setattr(DealerService, "_read", told)
    patch.setattr(Dealer, "deal_further", moved)
    with t.trio(cache=cache) as parties:
        reply = [token.id for token in parties.client().generate(ids=PROMPT, max_new_tokens=tokens, ignore_eos=True)]
    return asked, reply


def test_a_pass_that_moves_on_is_not_walked_on_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once one of its way was walked to see that it is so; where a row is filled up, what follows is walked."""
    walked: list[int] = []
    of = Sketches.of
    monkeypatch.setattr(Sketches, "of", lambda *args: (walked.append(1), of(*args))[1])
    asked, reply = asked_of_the_dealer(tmp_path, monkeypatch, 16)
    # of 15 further tokens the first, and the one for which a row is filled up to 32, are asked for by all their kinds; one is dealt in vain
    assert t.is_greedy(PROMPT, reply) and asked == ["Deal", "Deal", *["Further"] * 6, "Prefetch", *["Further"] * 8]
    assert len(walked) == 5  # the prompt, two tokens, and around that one it and the one before it


def test_passes_that_do_not_move_on_as_they_should_are_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = sketches.moved_on
    monkeypatch.setattr(sketches, "moved_on", lambda kinds, first: [*(moved(kinds, first) or ()), Mask((1,), 1)])
    asked, reply = asked_of_the_dealer(tmp_path, monkeypatch, 5)
    assert t.is_greedy(PROMPT, reply) and asked == ["Deal", "Deal", *["Prefetch"] * 4]


def test_what_keeps_no_rows_is_not_written() -> None:
    """A graph with another kind of state has no tapes: they would be written twice, and then be of no use."""
    assert {op for op, node in NODE_KINDS.items() if node.state and node.taped} == {"attention", "relu_attention"}
    runtime: Any = SimpleNamespace(offset=3, fills=64, device="cpu", batch=None, party=SimpleNamespace(tables=None))
    for ops, shape in ((["attention", "linear"], (16, False)), (["attention", "scan"], None), (["ttt"], None)):
        graph: Any = SimpleNamespace(nodes=[NODE_KINDS[op] for op in ops])
        assert Replays(Tapes(), runtime, graph).of(Store(Role.SERVER, bytes(16)), Pass(1), None) == shape
