"""Server and client alone: what the next token takes is made in the rounds of this one, no more than may be used; and both fail as one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.sampling import Sampling
from privinf.client.session import ClientSession, Timing
from privinf.client.text import Token
from privinf.lowering.explain import explain
from privinf.session.messages import Pass, Terms
from privinf.transport.frames import FrameKind
from protocols.errors import ProtocolDesync, RefusedError
from protocols.sources.two_party.source import TwoPartySource
from tests.support import trio as t
from tests.support.duo import Duo, duo, served
from tests.support.failures import failed, new_lines
from tests.support.faults import Fault

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duo]:
    with duo(cache=tmp_path_factory.mktemp("meanwhile")) as made:
        yield made


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first names of what was dropped, at both ends."""
    found: list[int] = []
    own = TwoPartySource.drop
    monkeypatch.setattr(TwoPartySource, "drop", lambda source: found.append(source.next_name) or own(source))
    return found


def sent(session: ClientSession) -> list[tuple[str, FrameKind]]:
    """What this client sends from now on, by phase."""
    found: list[tuple[str, FrameKind]] = []
    connection, own = session.connection, session.connection._frames_of

    def frames_of(kind: FrameKind, body: Any) -> Any:
        found.append((connection.meter.phase, kind))
        return own(kind, body)

    connection._frames_of = frames_of  # type: ignore[method-assign]
    return found


def reply(conversation: Conversation, ids: list[int], count: int, **more: Any) -> list[int]:
    return [token.id for token in conversation.generate(ids, max_new_tokens=count, ignore_eos=True, **more)]


def totals(client: Client) -> tuple[int, ...]:
    assert client.result is not None
    offline, online = (client.result["traffic"][phase] for phase in ("offline", "online"))
    return offline["payload"], online["payload"], offline["rounds"], online["rounds"]


def predicted(tokens: int, seq: int = len(PROMPT)) -> tuple[int, ...]:
    total = explain(t.lowered(), seq, new_tokens=tokens, trust="two-party")["total"]
    return total["offline_bytes"], total["online_bytes"], total["offline_rounds"], total["rounds"]


def stretches(frames: list[tuple[str, FrameKind]]) -> list[str]:
    """The phases of the messages between parties, without repetitions: `offline` after `online` is the next pass's."""
    return [phase for phase, _ in groupby(phase for phase, kind in frames if kind is FrameKind.DATA)]


def test_the_next_token_is_made_in_the_rounds_of_this_one_and_nothing_after_the_last(pair: Duo) -> None:
    client = pair.client()
    for tokens in (1, 3):
        frames = sent(client.connect())
        found = [token.id for token in client.generate(ids=PROMPT, max_new_tokens=tokens, ignore_eos=True)]
        assert t.is_greedy(PROMPT, found) and totals(client) == predicted(tokens)
        passes = [place for place, frame in enumerate(frames) if frame == ("online", FrameKind.CONTROL)][:tokens]
        for number, (start, end) in enumerate(zip(passes, [*passes[1:], len(frames)], strict=True)):
            own = stretches(frames[start:end])
            assert len(own) > 6 if number < tokens - 1 else own[-2:] in (["offline", "online"], ["online"]) and len(own) <= 2, own


@pytest.mark.parametrize("seq", [4, 5, 6, 9])
def test_what_takes_more_rounds_to_make_than_the_token_before_has(pair: Duo, seq: int) -> None:
    client, prompt = pair.client(), [5] * seq
    found = [token.id for token in client.generate(ids=prompt, max_new_tokens=7, ignore_eos=True)]
    assert t.is_greedy(prompt, found) and totals(client) == predicted(7, seq)


def test_a_reply_that_stops_leaves_one_pass_unused_and_the_next_turn_goes_on(pair: Duo, dropped: list[int]) -> None:
    with Conversation(pair.client()) as plain:
        expected = reply(plain, PROMPT, 4)
    assert dropped == []
    stop = next(place for place in range(3) if expected[place] not in expected[:place])
    with Conversation(pair.client()) as conversation:
        first = reply(conversation, PROMPT, 4, sampling=Sampling(stop_ids=(expected[stop],)))
        assert first == expected[: stop + 1] and dropped == []
        second = reply(conversation, [7, 8], 2)
        assert t.is_greedy([*PROMPT, *first, 7, 8], second)
        assert len(dropped) == 2 and dropped[0] == dropped[1] > 1  # at each party, of the same names
        third = reply(conversation, [9], 2)
        assert t.is_greedy([*PROMPT, *first, 7, 8, *second, 9], third) and len(dropped) == 2


def test_what_a_reply_left_is_used_by_a_turn_of_one_token(pair: Duo, dropped: list[int]) -> None:
    with Conversation(pair.client()) as conversation:
        tokens = conversation.generate(
            PROMPT, max_new_tokens=4, ignore_eos=True, sampling=Sampling(stop_ids=tuple(range(t.lowered().info.vocab)))
        )
        first = [token.id for token in tokens]
        second = reply(conversation, [5], 1, keep_last=False)
    assert len(first) == 1 and t.is_greedy([*PROMPT, 5], second) and dropped == []


def test_what_pads_a_reply_hides_where_it_ends(pair: Duo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether more may follow depends on the longest reply alone."""
    seen: list[list[bool]] = []
    own = ClientSession._with_more

    def with_more(session: ClientSession, request: Pass, more: bool) -> Pass:
        seen[-1].append(more)
        return own(session, request, more)

    monkeypatch.setattr(ClientSession, "_with_more", with_more)
    for stop in ((), tuple(range(t.lowered().info.vocab))):
        seen.append([])
        sampling = Sampling(stop_ids=stop)
        made = list(pair.client(pad_reply=2).generate(ids=PROMPT, max_new_tokens=3, ignore_eos=True, sampling=sampling))
        assert len(made) == (1 if stop else 3)
    assert seen == [[True, True, True, False], [True, True]]


def test_what_is_made_meanwhile_counts_against_the_bytes_of_a_session(tmp_path: Path) -> None:
    limit = sum(predicted(2)[:2])
    with duo(cache=tmp_path, session_bytes=limit) as pair:
        client = pair.client()
        assert len(list(client.generate(ids=PROMPT, max_new_tokens=2, ignore_eos=True))) == 2
        found: list[Token] = []
        with pytest.raises(RefusedError, match=f"at most {limit} bytes"):
            found.extend(client.generate(ids=PROMPT, max_new_tokens=3, ignore_eos=True))
        assert len(found) == 1  # the third token would have been made with the second


def test_more_than_the_context_holds_is_not_foretold(pair: Duo) -> None:
    session = pair.client().connect()
    session.connection.send_control(Pass(t.lowered().info.n_positions, more=True))
    with pytest.raises(ProtocolDesync, match="asks for more than the model's"):
        session.connection.receive()
    session.close()


def test_a_client_that_prepares_within_a_reply_is_refused(pair: Duo) -> None:
    session = pair.client().connect()
    tokens = session.prefill(PROMPT, Terms(len(PROMPT), 4), timing := Timing())
    assert tokens.numel() == 1 and timing.tokens_s
    with pytest.raises(ProtocolDesync, match="prepare a query within another one"):
        session.prepare(3, 1, False)
    session.close()


@pytest.mark.parametrize("role", ["client", "server"])
def test_either_is_killed_while_two_passes_are_under_way(pair: Duo, tmp_path: Path, role: str) -> None:
    """At a message of the second token's making, which comes among those of the first."""
    client = pair.client()
    meter = client.connect().connection.meter
    list(client.generate(ids=PROMPT, max_new_tokens=1, ignore_eos=True))
    first = meter.total("offline").frames
    peer = "server" if role == "client" else "client"
    with served() as victim:
        said = len(victim.server.lines)
        with victim.faulty(Fault(role, f"{peer}:offline", first + 5)) as faulty:
            process = faulty.generate("--cache", tmp_path, "--max-new-tokens", 3)
            if role == "client":
                assert process.wait() == -signal.SIGKILL
                assert "client 127.0.0.1" in new_lines(victim.server, said)[0]
                again = victim.generate("--cache", tmp_path, "--max-new-tokens", 3)
                assert again.wait() == 0, again.err
            else:
                assert "127.0.0.1" in failed(process, (3, 4)) and victim.server.wait() == -signal.SIGKILL
