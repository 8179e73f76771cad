"""Log-probabilities of a prompt's tokens: those of the float model, from one pass, for what `explain` says and the budget counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.client.client import Client
from privinf.lowering.explain import explain
from protocols.errors import ConfigError, HandshakeError, RefusedError
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.trio import trio

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11]]
ERROR = 2 * t.LOGIT_ERROR


def check(found: list[dict[str, Any]], ids: list[int], tops: int = 2) -> None:
    with torch.no_grad():
        want = torch.log_softmax(t.float_model()(torch.tensor([ids]))[0].double(), -1)
    assert [each["token"] for each in found] == ids and found[0]["logprob"] is None and found[0]["top"] == ()
    for row, each in zip(want, found[1:], strict=False):
        assert abs(each["logprob"] - float(row[each["token"]])) < ERROR
        assert len(each["top"]) == tops and each["top"][0][1] >= each["top"][-1][1]
        assert all(abs(value - float(row[token])) < ERROR for token, value in each["top"])
        assert each["top"][0][1] >= float(row.max()) - ERROR


def ask(client: Client, ids: Any, **wishes: Any) -> list[Any]:
    made: Any = {"max_new_tokens": 2, "ignore_eos": True, "logprobs": 2, "score_prompt": True, **wishes}
    return list(client.generate(ids=ids, **made))


@pytest.mark.parametrize(("chunk", "pad"), [(0, 0), (3, 4)])
def test_a_prompts_tokens_have_the_models_log_probabilities(tmp_path: Path, chunk: int, pad: int) -> None:
    """In one pass, in pieces and padded; a padded prompt is another one to the model, and only its places are looked at."""
    with trio(cache=tmp_path) as parties:
        client = parties.client(chunk=chunk, pad_prompt=pad)
        tokens = ask(client, PROMPTS[0])
        assert client.result is not None
        found, made = client.result["prompt_logprobs"], client.result["logprobs"]
        if not pad:
            check(found, PROMPTS[0])
            assert t.is_greedy(PROMPTS[0], [token.id for token in tokens])
        assert [each["token"] for each in found] == PROMPTS[0] and [each["logprob"] is None for each in found] == [True] + [False] * 6
        assert [token.score._asdict() for token in tokens] == made and all(each["logprob"] == each["top"][0][1] for each in made)
        seq, traffic = len(PROMPTS[0]) + bool(pad), client.result["traffic"]["online"]
        total = explain(t.lowered(), seq, new_tokens=2, scores=True, chunk=chunk)["total"]
        assert (traffic["payload"], traffic["rounds"]) == (total["online_bytes"], total["rounds"])
        plain = explain(t.lowered(), seq, new_tokens=2, logits=True, chunk=chunk)["total"]
        assert plain["online_bytes"] < total["online_bytes"] and plain["rounds"] <= total["rounds"]


@pytest.mark.parametrize("chunk", [0, 2])
def test_prompts_of_a_batch_are_scored_together(tmp_path: Path, chunk: int) -> None:
    with trio(cache=tmp_path) as parties:
        replies = parties.client(chunk=chunk).generate(ids=PROMPTS, max_new_tokens=2, ignore_eos=True, logprobs=2, score_prompt=True)
        assert len(list(replies)) == 2 * len(PROMPTS)
        for ids, result in zip(PROMPTS, replies.results, strict=True):
            check(result["prompt_logprobs"], ids)
            assert t.is_greedy(ids, result["tokens"]) and len(result["logprobs"]) == 2


def test_two_parties_alone(tmp_path: Path) -> None:
    with duo(cache=tmp_path) as pair:
        client = pair.client()
        ask(client, PROMPTS[0], max_new_tokens=1)
        assert client.result is not None
        check(client.result["prompt_logprobs"], PROMPTS[0])
        total = explain(t.lowered(), len(PROMPTS[0]), scores=True, trust="two-party")["total"]
        traffic = client.result["traffic"]
        assert (traffic["online"]["payload"], traffic["online"]["rounds"]) == (total["online_bytes"], total["rounds"])
        assert traffic["offline"]["payload"] == total["offline_bytes"]


def test_each_position_is_an_output_of_the_budget(tmp_path: Path) -> None:
    with trio(cache=tmp_path, budget=10) as parties:
        client = parties.client()
        ask(client, PROMPTS[0], max_new_tokens=1)
        assert parties.server.model.budget is not None and sum(parties.server.model.budget.spent.values()) == 7
        with pytest.raises(RefusedError, match="the budget of 10 outputs"):
            ask(client, PROMPTS[0], max_new_tokens=1)
        ask(client, PROMPTS[1], max_new_tokens=1)  # three are left


def test_what_is_not_granted(tmp_path: Path) -> None:
    with trio(cache=tmp_path, allow_logits=False) as parties:
        with pytest.raises(HandshakeError, match="does not give logits"):
            ask(parties.client(), PROMPTS[1])
        with pytest.raises(ConfigError, match="a prompt is scored with log-probabilities"):
            ask(parties.client(), PROMPTS[1], logprobs=None)
        with pytest.raises(ConfigError, match="0 to 20 alternatives"):
            ask(parties.client(), PROMPTS[1], logprobs=21)
        assert parties.server.counters.counts["passes"] == 0


def test_a_score_is_the_logarithm_of_a_share() -> None:
    from privinf.client.scores import score

    logits = [0.5, 2.0, -1.0, 2.0]
    found = score(torch.tensor([logits]), 0, 3)
    total = math.fsum(map(math.exp, logits))
    assert math.isclose(found.logprob or 0, math.log(math.exp(0.5) / total)) and [token for token, _ in found.top] == [1, 3, 0]
