"""The client's choice of tokens and of where to stop, against references of their own, and over the protocol."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privinf.client.sampling import Sampler, Sampling, Stops, kept
from privinf.client.text import Streamer
from protocols.errors import ConfigError, HandshakeError
from tests.support import trio as t
from tests.support.ladder import LOGIT_ERROR
from tests.support.trio import trio


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Probabilities by the definition, in plain Python: the nucleus is the smallest set of the most probable whose sum reaches p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = math.fsum(weights.values())
    chosen: dict[int, float] = {}
    for i in order:
        if chosen and math.fsum(chosen.values()) / total >= top_p - 1e-12:
            break
        chosen[i] = weights[i]
    return {i: weight / math.fsum(chosen.values()) for i, weight in chosen.items()}


@settings(max_examples=200)
@given(
    st.lists(st.integers(-3000, 3000).map(lambda n: n / 256), min_size=1, max_size=40),
    st.floats(0.05, 5),
    st.integers(0, 45),
    st.floats(0.01, 1),
)
def test_kept_tokens_are_those_of_the_definition(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    ids, p = kept(torch.tensor(logits), Sampling(temperature, top_k, top_p))
    expected = reference(logits, temperature, top_k, top_p)
    if top_k == 1:
        expected = {next(iter(expected)): 1.0}
    assert abs(float(p.sum()) - 1) < 1e-9
    if len(ids) != len(expected):  # a sum that meets p up to rounding
        edge = math.fsum(list(reference(logits, temperature, top_k, 1.0).values())[: min(len(ids), len(expected))])
        assert abs(edge - top_p) < 1e-9
        return
    assert ids.tolist() == list(expected)
    assert all(abs(float(mine) - theirs) < 1e-9 for mine, theirs in zip(p, expected.values(), strict=True))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, top_p=0.5), [0]),  # the first has exactly a half
        (Sampling(1.0, top_p=0.5000001), [0, 1]),
        (Sampling(1.0, top_p=0.75), [0, 1]),
        (Sampling(1.0, top_p=1e-9), [0]),
        (Sampling(1.0, top_p=1.0), [0, 1, 2, 3]),
        (Sampling(1.0, top_k=3), [0, 1, 2]),  # of two equal ones the lower id
        (Sampling(1.0, top_k=100), [0, 1, 2, 3]),
        (Sampling(1.0, top_k=2, top_p=0.6), [0]),  # of the two that are left the first has two thirds
        (Sampling(0.0, top_k=3), [0]),
        (Sampling(5.0, top_k=1), [0]),
    ],
    ids=str,
)
def test_edges_of_the_nucleus(sampling: Sampling, expected: list[int]) -> None:
    halves = torch.tensor([math.log2(1 / 2), math.log2(1 / 4), math.log2(1 / 8), math.log2(1 / 8)], dtype=torch.float64) * math.log(2)
    assert kept(halves, sampling)[0].tolist() == expected


def test_choices_have_the_distribution() -> None:
    logits, sampling = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5]), Sampling(0.8, seed=11)
    sampler, count = Sampler(sampling), 20_000
    found = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(count)]), minlength=5).tolist()
    expected = reference(logits.tolist(), 0.8, 0, 1.0)
    chi2 = sum((found[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    assert chi2 < 23.5  # the 99.99 % point of chi-square with 4 degrees of freedom; the seed is fixed


def test_the_generator_is_as_documented() -> None:
    seed = 1234567890123
    key = hmac.new(seed.to_bytes(16, "little"), b"privinf sampling\x01", hashlib.sha256).digest()[:16]
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 50))
    logits = torch.linspace(-1, 1, 64)
    p = list(reference(logits.tolist(), 1.0, 0, 1.0).items())
    sampler = Sampler(Sampling(1.0, seed=seed))
    for n in range(50):
        u, total = (int.from_bytes(stream[8 * n : 8 * n + 8], "little") >> 11) / 2**53, 0.0
        passed = []
        for token, share in p:
            total += share
            passed += [token] if total > u else []
        assert sampler.choose(logits) == passed[0]


def test_seeds() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(3) == draw(3) != draw(4) and draw(None) != draw(None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 1 << 64},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"stop": (1,)},
        {"stop_ids": ("1",)},
    ],
    ids=str,
)
def test_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)


# ---- stop texts


@settings(max_examples=300)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_texts_are_found_wherever_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    watch, shown, rest = Stops(tuple(stops)), "", text
    while rest and not watch.found:
        size = data.draw(st.integers(1, len(rest)))
        shown += watch.add(rest[:size], last=size == len(rest))
        rest = rest[size:]
        assert text.startswith(shown)
    seen = text[: len(text) - len(rest)]
    first = min((seen.find(stop) for stop in stops if stop in seen), default=None)
    assert watch.found == (first is not None)
    assert shown == (text if first is None else seen[:first])


def test_nothing_is_held_back_for_longer_than_it_may_become_a_stop() -> None:
    watch = Stops(("\nUser:",))
    assert [watch.add(part) for part in ("Hello", "\nU", "nion", "\n", "User", ": x")] == ["Hello", "", "\nUnion", "", "", ""]
    assert watch.found and watch.add("more") == ""


def test_stop_texts_need_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        Streamer(None, ("x",))


# ---- over the protocol


def test_a_reply_is_sampled_and_stopped(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties:
        client = parties.client()
        greedy = list(client.generate("abc", max_new_tokens=12, ignore_eos=True))
        assert client.result is not None
        whole = str(client.result["text"])
        stop = whole[4:6]
        pieces = [token.text for token in client.generate("abc", max_new_tokens=12, ignore_eos=True, sampling=Sampling(stop=(stop,)))]
        expected = whole[: whole.find(stop)]
        assert "".join(map(str, pieces)) == expected == client.result["text"] and client.result["finish_reason"] == "stop"

        shown, several = "", Sampling(stop=("no such text", whole[5:9], stop))  # each of them spans tokens
        for token in client.generate("abc", max_new_tokens=12, ignore_eos=True, sampling=several):
            shown += str(token.text)
            assert expected.startswith(shown)  # what may become a stop is held back
        assert shown == expected and client.result["finish_reason"] == "stop"

        third = greedy[2].id
        count = [token.id for token in greedy].index(third) + 1
        tokens = list(client.generate("abc", max_new_tokens=12, ignore_eos=True, sampling=Sampling(stop_ids=(third,))))
        assert [token.id for token in tokens] == [token.id for token in greedy[:count]] and tokens[-1].text == ""

        sampling = Sampling(1.3, top_k=20, top_p=0.9, seed=5)
        ids = [token.id for token in client.generate(ids=[1, 2, 3], max_new_tokens=6, ignore_eos=True, logits=True, sampling=sampling)]
        again = Sampler(sampling)
        assert ids == [again.choose(logits) for logits in client.logits] and len(client.logits) == 6
        for done, logits in enumerate(client.logits):
            assert float((logits - t.float_logits([1, 2, 3, *ids[:done]])).abs().max()) < LOGIT_ERROR
        assert client.result["finish_reason"] == "length"


def test_sampling_is_refused_where_the_server_gives_no_logits(tmp_path: Path) -> None:
    with trio(cache=tmp_path, allow_logits=False) as parties:
        with pytest.raises(HandshakeError, match=r"does not give logits .*--allow-logits"):
            list(parties.client().generate("abc", sampling=Sampling(0.7)))
        assert len(list(parties.client().generate("abc", max_new_tokens=1, sampling=Sampling(0.7, top_k=1)))) == 1


def test_the_command_line_samples_and_stops(capfd: pytest.CaptureFixture[str]) -> None:
    from privinf.cli import app

    for words, says in ((("--top-k", "3"), "--temperature"), (("--temperature", "-1"), "the temperature"), (("--stop", ""), "stop texts")):
        assert app.main(["run", "nowhere", "--prompt", "x", *words]) == 2
        assert says in capfd.readouterr().err

    def ask(*words: str) -> tuple[int, dict[str, Any], str]:
        process = served.generate("--prompt", "abc", "--max-new-tokens", 4, "--ignore-eos", "--json", *words)
        return process.wait(), json.loads(process.out or "{}"), process.err

    with t.services("--allow-logits") as served:
        code, whole, _ = ask("--temperature", "1", "--seed", "1")
        assert code == 0 and len(whole["tokens"]) == 4 and "logits" not in whole
        code, cut, _ = ask("--stop", whole["text"][0], "--temperature", "0.9", "--top-k", "1")
        assert code == 0 and cut["finish_reason"] in ("stop", "length") and whole["text"][0] not in cut["text"]
    with t.services() as served:
        code, _, error = ask("--temperature", "1")
        assert code == 3 and "does not give logits" in error
