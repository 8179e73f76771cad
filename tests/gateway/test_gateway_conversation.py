"""A session that several queries extend: the float model's tokens, passes over what is new alone, and its ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from privinf.client.conversation import Conversation
from privinf.client.sampling import Sampling
from protocols.errors import ConfigError, HandshakeError, PrivinfError, TransportError
from protocols.sources.dealer import Dealer
from tests.support import trio as t
from tests.support.trio import Trio, trio
from tests.support.waiting import PATIENCE


def payload(conversation: Conversation) -> int:
    cell = conversation.session.connection.meter.total("online")
    return cell.payload_sent + cell.payload_received


def test_turns_go_on_from_what_is_cached(parties: Trio) -> None:
    sequence: list[int] = []
    with Conversation(parties.client()) as conversation:
        assert conversation.room == t.POSITIONS
        for turn in ([1, 2, 3, 4, 5], [6, 7], [8]):
            before = payload(conversation)
            tokens = [token.id for token in conversation.generate(turn, max_new_tokens=3, ignore_eos=True)]
            assert t.is_greedy([*sequence, *turn], tokens) and len(tokens) == 3
            sequence += [*turn, *tokens]
            assert conversation.ids == sequence and conversation.room == t.POSITIONS - len(sequence) + 1
            moved = payload(conversation) - before
        whole = parties.client()
        assert t.is_greedy(sequence[:-3], [token.id for token in whole.generate(ids=sequence[:-3], max_new_tokens=3, ignore_eos=True)])
        assert whole.result is not None and moved < 0.6 * whole.result["traffic"]["online"]["payload"]
        last = [token.id for token in conversation.generate([9], max_new_tokens=2, ignore_eos=True, keep_last=False)]
        assert t.is_greedy([*sequence[:-1], 9], last) and conversation.ids == [*sequence[:-1], 9, *last]


def test_what_was_dealt_ahead_is_used_by_the_token_that_follows_and_by_nothing_else(parties: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of two tokens is not what the dealer foresaw: it deals under the same names anew, and has sent nothing of the first."""
    honest, dealt = Dealer.rewind, []
    monkeypatch.setattr(Dealer, "rewind", lambda dealer, name: (dealt.append((name, dealer.next_name)), honest(dealer, name)))
    sequence: list[int] = []
    with Conversation(parties.client()) as conversation:
        for turn in ([1, 2, 3], [4, 5], [6, 7]):
            before, names = parties.dealer.counters.counts["correlations"], conversation.session.store.next_name
            tokens = [token.id for token in conversation.generate(turn, max_new_tokens=3, ignore_eos=True)]
            assert t.is_greedy([*sequence, *turn], tokens)
            sequence += [*turn, *tokens]
            sent = parties.dealer.counters.counts["correlations"] - before
            assert sent == conversation.session.store.next_name - names  # what was dropped was sent to nobody
    assert len(dealt) == 2 and all(first < after for first, after in dealt)
    monkeypatch.setattr("privinf.dealer.dealer.MOST_PREFETCHED", 0)  # passes too large to be kept are dealt when they are asked for
    monkeypatch.setattr("privinf.server.dealer_source.CONTROL_LIMIT", 0)  # and lists too long for the sockets' buffers are sent later
    tokens = [token.id for token in parties.client().generate(ids=[1, 2, 3], max_new_tokens=6, ignore_eos=True)]
    assert t.is_greedy([1, 2, 3], tokens) and len(tokens) == 6


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(parties: Trio) -> None:
    with Conversation(parties.client()) as conversation:
        tokens = [token.id for token in conversation.generate([1] * 20, max_new_tokens=2, ignore_eos=True)]
        for wrong, message in (([1] * 11, "33 tokens, and the model's context 32"), ([97], "outside of the vocabulary")):
            with pytest.raises(ConfigError, match=message):
                list(conversation.generate(wrong))
        more = [token.id for token in conversation.generate([1] * 5, max_new_tokens=100, ignore_eos=True)]
        assert t.is_greedy([1] * 20 + tokens + [1] * 5, more) and len(more) == t.POSITIONS - 27 + 1


def test_a_reply_that_the_caller_leaves_ends_the_conversation(parties: Trio) -> None:
    conversation = Conversation(parties.client()).open()
    tokens = conversation.generate([1, 2], max_new_tokens=20, ignore_eos=True)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert not conversation.usable
    with pytest.raises(TransportError, match="is over"):
        list(conversation.generate([3]))
    t.wait_for(lambda: not parties.server.peers)


def test_it_ends_from_another_thread(parties: Trio) -> None:
    conversation = Conversation(parties.client()).open()
    failed: list[PrivinfError] = []

    def work() -> None:
        try:
            while True:
                list(conversation.generate([1], max_new_tokens=1, ignore_eos=True))
        except PrivinfError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    conversation.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and isinstance(failed[0], TransportError | ConfigError)
    t.wait_for(lambda: not parties.server.peers and not parties.dealer.peers)


def test_a_server_that_is_gone_or_gives_no_logits(tmp_path: Path) -> None:
    with trio(cache=tmp_path, allow_logits=False) as parties:
        with Conversation(parties.client()) as conversation, pytest.raises(HandshakeError, match="does not give logits"):
            list(conversation.generate([1], sampling=Sampling(1.0)))
        conversation = Conversation(parties.client()).open()
        list(conversation.generate([1], max_new_tokens=1))
    with pytest.raises(TransportError):
        list(conversation.generate([1], max_new_tokens=1))
    assert not conversation.usable
