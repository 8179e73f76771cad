"""What a session does: the float model's tokens, its counters, its options, several clients, and the local session's processes."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import privinf
from privinf.client.client import Client
from privinf.client.text import Streamer
from privinf.lowering.explain import explain
from protocols.errors import ConfigError, HandshakeError, TransportError
from tests.support import trio as t
from tests.support.ladder import LOGIT_ERROR
from tests.support.trio import Trio, trio

FIELDS = {"text", "prompt_tokens", "tokens", "finish_reason", "timing", "traffic", "trust", "ring_bits", "fractional_bits", "model"}
COUNTERS = {"sent", "received", "payload", "rounds"}


def ids_of(client: Client, prompt: list[int], count: int, **options: Any) -> list[int]:
    return [token.id for token in client.generate(ids=prompt, max_new_tokens=count, ignore_eos=True, **options)]


# ---- the float model's tokens


@pytest.mark.parametrize("prompt", ["x", "def main(", "a much longer prompt, 31 letters"[:31]])
def test_tokens_are_the_float_models(parties: Trio, prompt: str) -> None:
    client = parties.client()
    tokens = list(client.generate(prompt, max_new_tokens=3, ignore_eos=True))
    ids = t.tokenizer().encode(prompt).ids
    assert len(tokens) == min(3, t.POSITIONS - len(ids) + 1) and t.is_greedy(ids, [token.id for token in tokens])
    assert client.result is not None
    assert "".join(token.text or "" for token in tokens) == client.result["text"] == t.tokenizer().decode([token.id for token in tokens])


def test_the_cache_equals_whole_passes_up_to_the_contexts_end(parties: Trio) -> None:
    client, prompt = parties.client(), [(5 * i) % 90 for i in range(14)]
    tokens = ids_of(client, prompt, 1000)
    assert len(tokens) == t.POSITIONS - len(prompt) + 1 and t.is_greedy(prompt, tokens)
    assert len(set(tokens)) > 5  # otherwise the test says nothing
    assert client.result is not None and client.result["finish_reason"] == "length"


def test_a_prompt_that_fills_the_context_yields_one_token(parties: Trio) -> None:
    prompt = [(7 * i) % 90 for i in range(t.POSITIONS)]
    tokens = ids_of(parties.client(), prompt, 5)
    assert len(tokens) == 1 and t.is_greedy(prompt, tokens)


def test_the_end_token(parties: Trio) -> None:
    (first, *_) = ids_of(parties.client(), [5, 6], 2)
    with trio(t.changed(parties.server.lowered, eos=(first,))) as other:
        client = other.client(fresh=True)
        tokens = list(client.generate(ids=[5, 6], max_new_tokens=4))
        assert [token.id for token in tokens] == [first]
        assert client.result is not None
        assert client.result["tokens"] == [first] and client.result["finish_reason"] == "stop" and client.result["text"] == ""
        assert len(ids_of(client, [5, 6], 2)) == 2


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with trio(t.lowered(texts=False), cache=tmp_path) as parties:
        client = parties.client()
        tokens = list(client.generate(ids=[4, 5, 6], max_new_tokens=2))
        assert all(token.text is None for token in tokens) and t.is_greedy([4, 5, 6], [token.id for token in tokens], texts=False)
        assert client.result is not None and client.result["text"] is None
        with pytest.raises(ConfigError, match="no tokenizer"):
            list(client.generate("text"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"ids": []}, "the prompt is empty"),
        ({"ids": [1] * 33}, "33 tokens, and the model's context 32"),
        ({"ids": [97]}, "outside of the vocabulary of 97"),
        ({"ids": [-1]}, "outside of the vocabulary of 97"),
        ({"ids": ["1"]}, "whole numbers"),
        ({"ids": [1.0]}, "whole numbers"),
        ({"prompt": b"bytes"}, "the prompt is no text"),
        ({"prompt": "\udcff"}, "no text that the tokenizer can read"),
        ({}, "either a prompt or prompt ids"),
        ({"prompt": "x", "ids": [1]}, "either a prompt or prompt ids"),
        ({"prompt": "x", "max_new_tokens": 0}, "at least one new token"),
    ],
)
def test_wrong_prompts(parties: Trio, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(parties.client().generate(**request_))


def test_logits(parties: Trio) -> None:
    client = parties.client()
    tokens = ids_of(client, [9, 8, 7], 2, logits=True)
    assert t.is_greedy([9, 8, 7], tokens) and len(client.logits) == 2
    for done, found in enumerate(client.logits):
        expected = t.float_logits([9, 8, 7, *tokens[:done]])
        assert float((found - expected).abs().max()) < LOGIT_ERROR
        assert torch.equal(found * 1024, (found * 1024).round())  # no finer than 2^-10
    torch.testing.assert_close(client.run(torch.tensor([[9, 8, 7]]))[0], t.float_logits([9, 8, 7]), atol=LOGIT_ERROR, rtol=0)
    for wrong in ((torch.tensor([[1.0]]),), (torch.tensor([1]), torch.tensor([1])), ()):
        with pytest.raises(ConfigError, match=r"the model takes ids \(1, T\)"):
            client.run(*wrong)


def test_logits_are_refused_unless_the_server_grants_them(tmp_path: Path) -> None:
    with trio(cache=tmp_path, allow_logits=False) as parties:
        for ask in (lambda: ids_of(parties.client(), [1], 1, logits=True), lambda: parties.client().run(torch.tensor([[1]]))):
            with pytest.raises(HandshakeError, match=r"does not give logits .*--allow-logits") as found:
                ask()
            assert found.value.exit_code == 3
        assert len(ids_of(parties.client(), [1], 1)) == 1


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.second(self.first(x) * 0.5), dim=-1)


def rows() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 4))


def test_a_lowered_module(tmp_path: Path) -> None:
    module, x = Small().requires_grad_(False), torch.linspace(-1, 1, 12).reshape(2, 6)
    with trio(privinf.lower(module, (x,)), cache=tmp_path) as parties:
        client = parties.client()
        torch.testing.assert_close(client.run(x), module(x), atol=0.01, rtol=0)
        for wrong, message in ((x[:1], "takes inputs of shapes"), (x / 0, "is not finite"), (x.long(), "is to be real numbers")):
            with pytest.raises(ConfigError, match=message):
                client.run(wrong)
        with pytest.raises(ConfigError, match="no language model"):
            list(client.generate("x"))


def test_a_lowered_module_of_ids(tmp_path: Path) -> None:
    module, ids = rows().requires_grad_(False), torch.tensor([[1, 2, 10, 0]])
    with trio(privinf.lower(module, (ids,)), cache=tmp_path) as parties:
        client = parties.client()
        torch.testing.assert_close(client.run(ids), module(ids), atol=0.01, rtol=0)
        for wrong, message in ((ids + 1, "outside of the vocabulary"), (ids.float(), "is to be ids")):
            with pytest.raises(ConfigError, match=message):
                client.run(wrong)


# ---- counters


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("count", [1, 4, 17])
def test_counted_equals_explained(parties: Trio, count: int, logits: bool) -> None:
    client, fresh = parties.client(fresh=True), explain(parties.server.lowered, count, logits=logits)["total"]
    ids_of(client, [11] * count, 1, logits=logits)
    assert client.result is not None
    traffic = client.result["traffic"]
    assert traffic["online"]["payload"] == fresh["online_bytes"]
    assert traffic["online"]["rounds"] == fresh["rounds"]
    assert traffic["offline"]["dealer"]["payload"] == fresh["dealer_bytes"]
    assert traffic["offline"]["peer"]["payload"] == fresh["peer_offline_bytes"]
    assert traffic["setup"]["payload"] == fresh["setup_bytes"]


def test_counted_equals_explained_of_a_module(tmp_path: Path) -> None:
    lowered, x = privinf.lower(torch.nn.Linear(4, 3), torch.randn(2, 4)), torch.ones(2, 4)
    with trio(lowered, cache=tmp_path / "cache") as parties:
        client, expected = parties.client(), explain(lowered)["total"]
        client.run(x)
        assert client.result is not None
        online = client.result["traffic"]["online"]
        assert (online["payload"], online["rounds"]) == (expected["online_bytes"], expected["rounds"])


def test_counted_equals_explained_over_several_tokens(parties: Trio) -> None:
    client = parties.client()
    ids_of(client, [3, 4], 5)
    expected = explain(parties.server.lowered, 2, new_tokens=5)["total"]
    assert client.result is not None
    traffic = client.result["traffic"]
    assert (traffic["online"]["payload"], traffic["online"]["rounds"]) == (expected["online_bytes"], expected["rounds"])
    assert traffic["offline"]["payload"] == expected["dealer_bytes"] + expected["peer_offline_bytes"]


def test_the_fields_of_the_result(parties: Trio) -> None:
    client = parties.client()
    ids_of(client, [3, 4], 2)
    result = client.result
    assert result is not None and set(result) >= FIELDS and json.loads(json.dumps(result)) == result
    assert set(result["timing"]) == {"setup_s", "offline_s", "first_token_s", "per_token_s"}
    assert len(result["timing"]["per_token_s"]) == len(result["tokens"]) == 2
    assert result["timing"]["per_token_s"][0] == result["timing"]["first_token_s"] > 0
    traffic = result["traffic"]
    assert set(traffic) == {"setup", "offline", "online"} and set(traffic["setup"]) == set(traffic["online"]) == COUNTERS
    assert set(traffic["offline"]) == COUNTERS | {"dealer", "peer"}
    assert set(traffic["offline"]["dealer"]) == set(traffic["offline"]["peer"]) == COUNTERS
    for name in COUNTERS:
        assert traffic["offline"][name] == traffic["offline"]["dealer"][name] + traffic["offline"]["peer"][name]
    assert result["trust"] == "dealer" and result["ring_bits"] <= 64 and result["fractional_bits"] > 0
    assert set(result["model"]) == {"variant", "layers", "heads", "width", "vocab", "id", "tokenizer"}
    assert (result["model"]["variant"], result["model"]["layers"], result["model"]["vocab"]) == ("SM(t)+ScFuFFN", 2, t.VOCAB)


# ---- set-up


def test_a_second_session_pays_no_set_up(parties: Trio) -> None:
    first, again = parties.client(fresh=True), None
    ids_of(first, [1], 1)
    again = parties.client(cache=first.options.cache)
    ids_of(again, [1], 1)
    assert first.result is not None and again.result is not None
    assert first.result["traffic"]["setup"]["payload"] > 50_000
    assert again.result["traffic"]["setup"]["payload"] == 0 and again.result["traffic"]["setup"]["received"] < 5_000
    assert {path.stat().st_mode & 0o777 for path in first.options.cache.rglob("*") if path.is_file()} == {0o600}


def test_an_interrupted_set_up_goes_on_where_it_stopped(parties: Trio) -> None:
    class Enough(Exception):
        pass

    def stop(phase: str, share: float) -> None:
        if phase == "set-up" and share >= 0.5:
            raise Enough

    client = parties.client(fresh=True)
    client.peers.progress = stop
    with pytest.raises(Enough):
        ids_of(client, [1], 1)
    again = parties.client(cache=client.options.cache)
    ids_of(again, [1], 1)
    assert again.result is not None
    payload, whole = again.result["traffic"]["setup"]["payload"], explain(parties.server.lowered)["total"]["setup_bytes"]
    kept = sum(path.stat().st_size for path in client.options.cache.rglob("setup/*/*.bin"))
    assert 0 < payload < whole and kept == whole


def test_a_damaged_cache_is_reported_and_heals(parties: Trio, caplog: pytest.LogCaptureFixture) -> None:
    client = parties.client(fresh=True)
    expected = ids_of(client, [1, 2], 2)
    first, second, third = sorted(client.options.cache.rglob("setup/*/*.bin"))[:3]
    data = bytearray(first.read_bytes())
    data[40] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    (bundle,) = client.options.cache.glob("bundles/*")
    bundle.write_bytes(b"{}")
    caplog.clear()
    assert ids_of(client, [1, 2], 2) == expected
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and "was damaged" in record.getMessage()]
    assert len(said) == 3 and all("fetched anew" in line for line in said)
    caplog.clear()
    assert ids_of(client, [1, 2], 2) == expected
    assert (
        not [r for r in caplog.records if r.levelname == "WARNING"]
        and client.result is not None
        and client.result["traffic"]["setup"]["payload"] == 0
    )


def test_a_cache_that_cannot_be_written(parties: Trio, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a directory is wanted")
    with pytest.raises(ConfigError, match=r"cannot (read|write) .*; .*--cache"):
        ids_of(parties.client(cache=tmp_path / "cache"), [1], 1)


def test_expect(parties: Trio) -> None:
    known = parties.server.lowered.id
    assert len(ids_of(parties.client(expect=known), [1], 1)) == 1
    with pytest.raises(HandshakeError, match=f"has the model '{known}', not the expected 'f00'") as found:
        ids_of(parties.client(expect="f00"), [1], 1)
    assert found.value.exit_code == 3


# ---- several clients


def test_clients_one_after_another_and_side_by_side(parties: Trio) -> None:
    prompts = [[1, 2, 3], [50, 60], [7]]
    alone = [ids_of(parties.client(), prompt, 3) for prompt in prompts]
    assert all(t.is_greedy(prompt, tokens) for prompt, tokens in zip(prompts, alone, strict=True))
    shared = parties.client()  # one client object for all threads
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda prompt: ids_of(shared, prompt, 3), prompts))
    assert all(t.is_greedy(prompt, tokens) for prompt, tokens in zip(prompts, together, strict=True))


def test_a_generator_that_is_dropped_frees_the_server(parties: Trio) -> None:
    client = parties.client()
    tokens = client.generate(ids=[1, 2], max_new_tokens=20, ignore_eos=True)
    first = next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    t.wait_for(lambda: not parties.server.peers and not parties.dealer.peers)
    assert not parties.dealer._sessions and not client.sessions
    assert next(client.generate(ids=[1, 2])).id == first.id
    client.close()


def test_generate_async(parties: Trio) -> None:
    async def talk() -> tuple[list[list[int]], int]:
        async def one(prompt: list[int]) -> list[int]:
            return [token.id async for token in parties.client().generate_async(ids=prompt, max_new_tokens=2, ignore_eos=True)]

        both = await asyncio.gather(one([1, 2, 3]), one([50, 60]))
        slow, seen = parties.client(link="2000ms:100"), 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                async for _ in slow.generate_async(ids=[1], max_new_tokens=30):
                    seen += 1
        return list(both), slow.sessions

    both, left = asyncio.run(talk())
    assert left == 0 and t.is_greedy([1, 2, 3], both[0]) and t.is_greedy([50, 60], both[1])


def test_a_server_that_was_closed(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties:
        client = parties.client(timeout=1.0)
        tokens = client.generate(ids=[1], max_new_tokens=20, ignore_eos=True)
        next(tokens)
        parties.server.close()
        parties.server.close()
        with pytest.raises(TransportError) as found:
            list(tokens)
        assert found.value.exit_code == 4 and "\n" not in str(found.value)
        with pytest.raises(TransportError, match="could not connect within 1 s") as found:
            ids_of(client, [1], 1)
        assert found.value.exit_code == 3


def test_addresses_and_keys_are_checked_at_once(tmp_path: Path) -> None:
    for make in (
        lambda: Client("nowhere", dealer="localhost:1", keys=str(t.keys())),
        lambda: Client("localhost:1", dealer="nowhere", keys=str(t.keys())),
        lambda: privinf.Server(t.lowered(), listen="127.0.0.1:0", dealer="nowhere", keys=str(t.keys())),
    ):
        with pytest.raises(ConfigError, match="cannot read the address 'nowhere'"):
            make()
    with pytest.raises(ConfigError, match=r"no cert\.pem for the client"):
        Client("localhost:1", dealer="localhost:1", keys=str(tmp_path))


def test_the_streamer_holds_back_half_a_character() -> None:
    class Halves:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", "replace")

    streamer = Streamer(Halves())
    assert [streamer.add(byte) for byte in "aé".encode()] == ["a", "", "é"]
    assert streamer.add(0xC3) == "" and streamer.rest() == "\ufffd" and streamer.finish() == "aé\ufffd"
