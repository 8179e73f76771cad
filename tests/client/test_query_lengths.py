"""A query's lengths: prompts in pieces, padded prompts and replies, the price of a token, the context's end.

What the server sees of a query is the list of messages that reach it from the client: their kinds and sizes, in order.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.sampling import Sampling
from privinf.client.session import ClientSession
from privinf.graph.private import Runtime
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import next_token
from privinf.lowering.steps import padded, steps
from privinf.session.messages import Pass, Terms
from privinf.session.options import Options
from privinf.transport.connection import Connection
from privinf.transport.endpoint import OnMessage
from privinf.transport.frames import FrameKind
from protocols.correlations import Role
from protocols.errors import ConfigError, TransportError
from protocols.party import Party, Trace
from protocols.product import Cached
from protocols.ring import blank
from protocols.rows import Rows
from protocols.shares import Wire
from protocols.softmax import AttentionRings, attention
from tests.support import trio as t
from tests.support.gateway import Gateway, gateway
from tests.support.ladder import IDS, LOGIT_ERROR, float_logits, make
from tests.support.trio import Trio, trio

PROMPT = [(7 * i) % 90 for i in range(17)]


def ask(client: Client, ids: list[int], count: int, **more: Any) -> list[int]:
    return [token.id for token in client.generate(ids=ids, max_new_tokens=count, **{"ignore_eos": True, **more})]


def result_of(client: Client) -> dict[str, Any]:
    assert client.result is not None
    return client.result


def shown(client: Client) -> tuple[int, int]:
    """The two lengths as the server saw them."""
    padded = result_of(client)["padded"]
    assert (padded["seconds"] > 0) == (padded["tokens"] > len(result_of(client)["tokens"]))
    return padded["prompt_tokens"], padded["tokens"]


# ---- the numbers


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 320))
def test_steps_take_in_the_whole_prompt_and_reveal_one_output_a_token(seq: int, new_tokens: int, chunk: int) -> None:
    found = steps(seq, new_tokens, chunk)
    prefill, rest = found[: len(found) - new_tokens + 1], found[len(found) - new_tokens + 1 :]
    assert sum(count for count, _ in prefill) == seq and max(count for count, _ in prefill) <= (chunk or seq)
    assert [output for _, output in prefill] == [False] * (len(prefill) - 1) + [True] and len(prefill) == -(-seq // (chunk or seq))
    assert rest == [(1, True)] * (new_tokens - 1)
    assert [(each.count, each.output) for each in Terms(seq, new_tokens, True, chunk).passes] == found


@given(st.integers(1, 300), st.integers(0, 64), st.integers(0, 300))
def test_padding_depends_on_the_bucket_alone(count: int, multiple: int, spare: int) -> None:
    room = count + spare
    found = padded(count, multiple, room)
    if multiple == 0:
        assert found == count
    else:
        assert count <= found <= room and (found == room or (found % multiple == 0 and found - count < multiple))


# ---- prompts in pieces


@pytest.mark.parametrize("chunk", [1, 5, 8, 17, 100])
def test_a_prompt_in_pieces(parties: Trio, chunk: int) -> None:
    """The float model's logits and tokens, and the bytes and rounds that were explained."""
    client = parties.client(chunk=chunk)
    tokens = ask(client, PROMPT, 3, logits=True)
    assert t.is_greedy(PROMPT, tokens)
    for done, found in enumerate(client.logits):
        assert float((found - t.float_logits([*PROMPT, *tokens[:done]])).abs().max()) < LOGIT_ERROR
    traffic, total = result_of(client)["traffic"], explain(parties.server.lowered, 17, logits=True, new_tokens=3, chunk=chunk)["total"]
    assert (traffic["online"]["payload"], traffic["online"]["rounds"]) == (total["online_bytes"], total["rounds"])
    assert traffic["offline"]["dealer"]["payload"] == total["dealer_bytes"]
    assert traffic["offline"]["peer"]["payload"] == total["peer_offline_bytes"]
    assert result_of(client)["prompt_tokens"] == 17 and len(result_of(client)["timing"]["per_token_s"]) == 3
    torch.testing.assert_close(client.run(torch.tensor([PROMPT]))[0], t.float_logits(PROMPT), atol=LOGIT_ERROR, rtol=0)


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+LN+R", "SM(t)+ScFuFFN_i1"])
def test_a_prompt_in_pieces_on_other_networks(tmp_path: Path, variant: str) -> None:
    lowered, model = make(tmp_path / "checkpoint", variant)
    with trio(lowered, cache=tmp_path / "cache") as parties:
        client = parties.client(chunk=5)
        found = client.run(torch.tensor([IDS])).reshape(-1)
        assert float((found - float_logits(model, IDS)).abs().max()) < LOGIT_ERROR
        traffic, total = result_of(client)["traffic"], explain(lowered, len(IDS), logits=True, chunk=5)["total"]
        assert (traffic["online"]["payload"], traffic["online"]["rounds"]) == (total["online_bytes"], total["rounds"])


def test_a_pass_without_output_reveals_nothing_and_leaves_out_what_only_an_output_needs(parties: Trio) -> None:
    lowered: Lowered = parties.server.lowered

    def walked(output: bool) -> Trace:
        trace = Trace(Role.CLIENT)
        runtime = Runtime.of(lowered.graph, Party(Role.CLIENT, trace))
        found = next_token(lowered.graph, runtime, blank(1, 8), logits=False, output=output)
        assert (found is not None) == output and runtime.offset == 8 and len(runtime.state) == lowered.info.layers
        return trace

    whole, filling = walked(True), walked(False)
    left_out = set(whole.costs) - set(filling.costs)
    assert {("", "argmax"), ("", "lm_head.linear")} <= left_out, left_out
    assert not any("mlp" in f"{layer}.{op}" and layer == "h.1" for layer, op in filling.costs)  # the last layer's
    assert any("c_attn" in f"{layer}.{op}" and layer == "h.1" for layer, op in filling.costs)  # its keys and values are kept
    assert sum(cost.online_bytes for cost in filling.costs.values()) < sum(cost.online_bytes for cost in whole.costs.values())
    # the last layer opens keys and values alone, and nothing comes after
    kept = [kind for kind in filling.kinds if type(kind).__name__ == "Mask" and getattr(kind, "keep", 0)]
    assert len(kept) == 2 * lowered.info.layers and filling.kinds[-1] == kept[-1]


# ---- the price of a token


def test_the_price_of_a_token_with_a_cache_is_as_explained(parties: Trio) -> None:
    """Each further query of a conversation, by bytes and rounds, and what the dealer sends for it."""
    lowered = parties.server.lowered
    with Conversation(parties.client()) as conversation:
        session, cached = conversation.session, 0

        def counted() -> tuple[int, int, int, int]:
            online, offline, dealer = (
                session.connection.meter.total("online"),
                session.connection.meter.total("offline"),
                session.source.link.meter.total(),
            )
            sums = (cell.payload_sent + cell.payload_received for cell in (online, offline, dealer))
            moved = tuple(sums)
            return moved[0], online.rounds, moved[1], moved[2]

        for fresh in (1, 1, 3, 1, 7, 1, 1):
            before = counted()
            list(conversation.generate([2] * fresh, max_new_tokens=1, ignore_eos=True, keep_last=False))
            moved = tuple(after - earlier for after, earlier in zip(counted(), before, strict=True))
            total = explain(lowered, fresh, cached=cached)["total"]
            assert moved == (total["online_bytes"], total["rounds"], total["peer_offline_bytes"], total["dealer_bytes"])
            cached += fresh


def test_the_price_of_a_token_is_linear_in_what_is_cached() -> None:
    """Attention alone depends on it: for 12 heads of 64 a straight line above a row's bound, within 2 % of its end at 1024 positions."""
    lowered = t.lowered()
    rest = [[op for op in explain(lowered, 1, cached=cached)["ops"] if op["op"] != "attn.attention"] for cached in (1, 2, 9, 31)]
    assert all(each == rest[0] for each in rest) and len(rest[0]) > 5

    def cost(cached: int) -> int:
        trace = Trace(Role.CLIENT)
        q = Wire(blank(12, 1, 64), blank(12, 1, 64), 1, 33, 12)
        keys, values = (Cached(blank(12, cached, 64), blank(12, cached, 64), (name,), bits, 12) for name, bits in ((2, 33), (3, 44)))
        party = Party(Role.CLIENT, trace)
        party.run(attention(party, q, keys, values, Rows(cached, 1, 1), AttentionRings()))
        return sum(each.online_bytes for each in trace.costs.values())

    lengths = range(32, 1025, 31)
    slope, constant = statistics.linear_regression(lengths, [cost(length) for length in lengths])
    assert all(abs(slope * length + constant - cost(length)) < 0.02 * cost(1024) for length in lengths) and constant < 0.1 * cost(1024)


def test_what_cannot_be_explained() -> None:
    for wrong in ({"seq": 2, "cached": 31}, {"seq": 1, "cached": 30, "new_tokens": 3}, {"seq": 33}):
        with pytest.raises(ConfigError, match="not fit the model's context of 32"):
            explain(t.lowered(), **wrong)  # type: ignore[arg-type]


# ---- padding


class Seen:
    """What reaches the server from clients: kind and size of every message after the handshake's."""

    def __init__(self, parties: Trio) -> None:
        self._parties = parties
        self.messages: list[tuple[FrameKind, str, int]] = []

    def __enter__(self) -> Seen:
        def watch(connection: Connection) -> OnMessage:
            return lambda kind, body: (
                self.messages.append((kind, connection.meter.phase, len(body))) if connection.peer_role == "client" else None
            )

        self._parties.server.watch = watch
        return self

    def __exit__(self, *_: object) -> None:
        self._parties.server.watch = None

    def take(self) -> list[tuple[FrameKind, str, int]]:
        found, self.messages = self.messages, []
        return found


def test_replies_of_one_bucket_look_alike_to_the_server(parties: Trio) -> None:
    whole = ask(parties.client(), PROMPT, 8)
    lengths, transcripts = set(), []
    with Seen(parties) as seen:
        ends = sorted({whole.index(token) + 1: token for token in whole}.items())
        for _, stop in (ends[0], ends[len(ends) // 2], ends[-1]):
            client = parties.client(pad_reply=8)
            tokens = ask(client, PROMPT, 8, sampling=Sampling(stop_ids=(stop,)))
            assert tokens == whole[: len(tokens)] and tokens[-1] == stop and result_of(client)["finish_reason"] == "stop"
            assert result_of(client)["tokens"] == tokens and shown(client) == (17, 8)
            assert len(result_of(client)["timing"]["per_token_s"]) == len(tokens)
            lengths.add(len(tokens))
            transcripts.append(seen.take())
        client = parties.client(pad_reply=8)
        assert ask(client, PROMPT, 3) == whole[:3] and result_of(client)["finish_reason"] == "length"
        transcripts.append(seen.take())
    assert len(lengths) == 3  # otherwise the test says nothing
    assert len(transcripts[0]) > 8 and all(each == transcripts[0] for each in transcripts)


def test_prompts_of_one_bucket_look_alike_to_the_server(parties: Trio) -> None:
    transcripts = []
    with Seen(parties) as seen:
        for count in (1, 5, 8):
            client = parties.client(pad_prompt=8)
            tokens = ask(client, PROMPT[:count], 2)
            assert t.is_greedy([t.END] * (8 - count) + PROMPT[:count], tokens)
            assert result_of(client)["prompt_tokens"] == count and shown(client) == (8, 2)
            transcripts.append(seen.take())
        assert transcripts[0] == transcripts[1] == transcripts[2]
        client = parties.client(pad_prompt=8, chunk=4)
        ask(client, PROMPT[:9], 1)
        passes = [size for kind, phase, size in seen.take() if (kind, phase) == (FrameKind.CONTROL, "online")]
        assert len(passes) == 4 + 1  # 16 positions by 4, and the end


def test_padding_ends_with_the_context(parties: Trio) -> None:
    client = parties.client(pad_prompt=20, pad_reply=100)
    assert len(ask(client, PROMPT, 4)) == 4 and shown(client) == (20, t.POSITIONS - 20 + 1)
    client = parties.client(pad_prompt=20)
    assert len(ask(client, [1] * 21, 4)) == 1 and shown(client) == (t.POSITIONS, 1)
    assert result_of(client)["finish_reason"] == "length"


def test_a_padded_conversation(parties: Trio) -> None:
    """What pads a turn stays in the sequence; a reply that was padded ends the conversation, for what padded it is in the cache."""
    with Conversation(parties.client(pad_prompt=6, pad_reply=2)) as conversation:
        first = [token.id for token in conversation.generate([1, 2, 3, 4], max_new_tokens=2, ignore_eos=True)]
        sequence = [t.END, t.END, 1, 2, 3, 4, *first]
        assert t.is_greedy(sequence[:-2], first) and conversation.ids == [1, 2, 3, 4, *first]
        assert conversation.room == t.POSITIONS - 7
        second = [token.id for token in conversation.generate([5, 6], max_new_tokens=1, ignore_eos=True)]
        assert t.is_greedy([*sequence, t.END, t.END, t.END, 5, 6], second)
        assert not conversation.usable and conversation.reply is not None and conversation.reply.shown == (6, 2)
    t.wait_for(lambda: not parties.server.peers)


def test_a_caller_who_turns_away_leaves_the_padding_out(parties: Trio) -> None:
    before = parties.server.counters.counts["passes"]
    tokens = parties.client(pad_reply=8).generate(ids=[1, 2], max_new_tokens=2, ignore_eos=True)
    next(tokens), next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    t.wait_for(lambda: not parties.server.peers)
    assert parties.server.counters.counts["passes"] - before == 2


def test_a_model_without_an_end_token_pads_no_prompt(tmp_path: Path) -> None:
    with trio(t.lowered(texts=False), cache=tmp_path) as parties:
        before = parties.server.counters.counts["passes"]
        with pytest.raises(ConfigError, match="names no end token"):
            ask(parties.client(pad_prompt=4), [1, 2], 1)
        assert parties.server.counters.counts["passes"] == before and len(ask(parties.client(pad_reply=4), [1, 2], 1)) == 1


def test_an_end_token_that_no_table_has_pads_no_prompt(tmp_path: Path) -> None:
    """A bundle may name one outside of the vocabulary; the next one stands in front of the prompt, or there is a line."""
    lowered, _ = make(tmp_path, "SM+ScFuFFN")
    session = SimpleNamespace(lowered=lowered, options=Options(pad_prompt=8))
    info = lowered.info
    for ends, found in (((300, 7), [7, 7, 1]), ((201,), [5, 5, 1]), ((200, 7), [200, 200, 1])):
        lowered.info = msgspec.structs.replace(info, eos=ends, bos=5)
        assert ClientSession.filled(session, [1], 3, 0) == found  # type: ignore[arg-type]
    lowered.info = msgspec.structs.replace(info, eos=(201,), bos=None)
    with pytest.raises(ConfigError, match="names no end token"):
        ClientSession.filled(session, [1], 3, 0)  # type: ignore[arg-type]


def test_padding_at_the_gateway(parties: Trio) -> None:
    """Each turn is padded; where that leaves no room for the next turn a conversation is begun anew, and so after a padded reply."""

    def complete(door: Gateway, prompt: str, count: int) -> tuple[int, int]:
        with door.openai(max_retries=0) as api:
            usage = api.completions.create(model="privinf", prompt=prompt, max_tokens=count, extra_body={"ignore_eos": True}).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.completion_tokens, usage.prompt_tokens_details.cached_tokens or 0

    with gateway(parties, client=parties.client(pad_prompt=9, chunk=4)) as door:
        assert complete(door, "abc", 2) == (2, 0)
        for turn in ("d", "e"):
            (held,) = door.engine.conversations.idle
            assert complete(door, f"{held.text}{turn}", 2)[1] > 3
        (held,) = door.engine.conversations.idle  # three turns of 9 and a new token each have left 2 of 32 positions
        assert complete(door, f"{held.text}fg", 2) == (2, 0)
    with gateway(parties, client=parties.client(pad_reply=4)) as door:
        assert complete(door, "abc", 3) == (3, 0) and not door.engine.conversations.idle
        assert complete(door, "abc", 4) == (4, 0) and len(door.engine.conversations.idle) == 1


# ---- prepared


def test_prepared_queries_are_cut_and_padded_as_they_were_prepared(parties: Trio) -> None:
    lengths = {"chunk": 4, "pad_prompt": 8, "pad_reply": 4}
    client = parties.client(**lengths)
    (made,) = client.prepare(6, max_new_tokens=3)["prepared"]
    assert {name: made[name] for name in ("seq", "max_new_tokens", "chunk")} == {"seq": 8, "max_new_tokens": 4, "chunk": 4}
    for other in ({}, {"chunk": 2, "pad_prompt": 8, "pad_reply": 4}):
        plain = parties.client(**other)
        ask(plain, PROMPT[:8], 3)
        assert not result_of(plain)["prepared"]
    tokens = ask(client, PROMPT[:5], 2)
    assert result_of(client)["prepared"] and result_of(client)["traffic"]["offline"]["payload"] == 0
    assert t.is_greedy([t.END] * 3 + PROMPT[:5], tokens) and shown(client) == (8, 4)


# ---- the context's end


def test_the_contexts_end_is_known_before_anything_is_spent(parties: Trio) -> None:
    before = parties.server.counters.counts["passes"], parties.dealer.counters.counts["correlations"]
    for client in (parties.client(), parties.client(chunk=4), parties.client(pad_prompt=4)):
        with pytest.raises(ConfigError, match="33 tokens, and the model's context 32") as found:
            ask(client, [1] * 33, 1)
        assert found.value.exit_code == 2
    assert (parties.server.counters.counts["passes"], parties.dealer.counters.counts["correlations"]) == before
    client = parties.client(chunk=7)
    tokens = ask(client, [1] * 30, 10**6)
    assert len(tokens) == 3 and result_of(client)["finish_reason"] == "length" and t.is_greedy([1] * 30, tokens)


# ---- a cache that is emptied, and one that the server drops


def test_a_new_conversation_begins_with_an_empty_cache(parties: Trio) -> None:
    """On one client, at the price of a first query and with its reply."""
    client = parties.client()
    for _ in range(2):
        with Conversation(client) as conversation:
            tokens = [token.id for token in conversation.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)]
            cell = conversation.session.connection.meter.total("online")
            assert t.is_greedy([1, 2, 3], tokens) and conversation.ids == [1, 2, 3, *tokens]
            total = explain(parties.server.lowered, 3, new_tokens=2)["total"]
            assert (cell.payload_sent + cell.payload_received, cell.rounds) == (total["online_bytes"], total["rounds"])


def test_an_idle_session_is_dropped_and_its_client_is_told(tmp_path: Path) -> None:
    """A conversation's next query says so in one line, and a further one works; what was only connected is replaced unasked."""
    with trio(cache=tmp_path, idle=1.0) as parties:
        conversation, waiting = Conversation(parties.client()).open(), parties.client()
        list(conversation.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True))
        first = waiting.connect()
        t.wait_for(lambda: not parties.server.peers and not parties.dealer.peers)
        spent = conversation.session.store.next_name
        with pytest.raises(TransportError, match="unused for 1 s") as found:
            list(conversation.generate([4], max_new_tokens=1))
        assert found.value.exit_code == 4 and "\n" not in str(found.value) and not conversation.usable
        assert conversation.session.store.next_name == spent
        tokens = ask(waiting, [1, 2, 3], 2)
        assert t.is_greedy([1, 2, 3], tokens) and waiting.sessions == 0 and first.runtime.offset == 0
        with Conversation(parties.client()) as another:
            assert len(list(another.generate([1, 2, 3, 4], max_new_tokens=1))) == 1


# ---- the command line


def test_the_command_line_cuts_and_pads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from privinf.cli import app

    with t.services() as served:
        words = ("--chunk", 4, "--pad-prompt", 8, "--pad-reply", 4, "--max-new-tokens", 3, "--ignore-eos", "--json")
        process = served.generate("--prompt-ids", "1,2,3", *words)
        assert process.wait() == 0, process.err
        found = json.loads(process.out)
        assert (
            len(found["tokens"]) == 3
            and found["padded"].items() >= {"prompt_tokens": 8, "tokens": 4}.items()
            and found["prompt_tokens"] == 3
        )
        stop = found["tokens"][1]
        process = served.generate("--prompt-ids", "1,2,3", *words, "--stop-ids", f"96,{stop}")
        assert process.wait() == 0 and json.loads(process.out)["tokens"] == found["tokens"][: found["tokens"].index(stop) + 1]
    counted = found["traffic"]["online"]["payload"]
    assert app.main(["explain", str(t.lowered_directory()), "--seq", "8", "--max-new-tokens", "4", "--chunk", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["online_bytes"] == counted
    assert app.main(["explain", str(t.lowered_directory()), "--seq", "1", "--cached", "9", "--json"]) == 0
    expected = explain(t.lowered(), 1, cached=9)["total"]
    assert json.loads(capsys.readouterr().out)["total"] == expected
    file = tmp_path / "privinf.yaml"
    file.write_text("chunk: 16\npad-reply: x\n")
    assert app.main(["config", "show", str(file), "generate"]) == 2 and "pad-reply" in capsys.readouterr().err
    for option in ("--chunk", "--pad-prompt", "--pad-reply"):
        assert app.main(["run", "nowhere", "--prompt", "x", option, "-1"]) == 2 and option in capsys.readouterr().err
    assert app.main(["run", "nowhere", "--prompt", "x", "--stop-ids", "a"]) == 2 and "--stop-ids" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"chunk": -1}, {"pad_reply": 1.5}, {"pad_prompt": "8"}, {"chunk": True}], ids=str)
def test_lengths_that_are_none(parties: Trio, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is not a whole number"):
        parties.client(**wrong)


def test_the_server_refuses_logits_of_a_pass_without_output(parties: Trio) -> None:
    session = parties.client().connect()
    session.connection.send_control(Pass(2, True, False))
    with pytest.raises(Exception, match="logits of a pass without output") as found:
        session.connection.receive()
    assert getattr(found.value, "exit_code", 0) == 4
    session.close()
