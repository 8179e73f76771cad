"""The parties as processes: the three verbs of the command line, and the local session."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import privinf
from privinf.local.session import LocalSession
from privinf.session.options import Options
from protocols.errors import ConfigError
from tests.support import trio as t
from tests.support.ladder import LOGIT_ERROR
from tests.support.waiting import PATIENCE

FIELDS = {"text", "prompt_tokens", "tokens", "finish_reason", "timing", "traffic", "trust", "ring_bits", "fractional_bits", "model"}
COUNTERS = {"sent", "received", "payload", "rounds"}


# ---- processes


def test_the_three_verbs(tmp_path: Path) -> None:
    with t.services("--json") as made:
        told = json.loads(made.server.out)
        model = {"variant": "SM(t)+ScFuFFN", "model": t.lowered().id, "tokenizer": t.lowered().tokenizer_id, "trust": "dealer"}
        assert told == {"role": "server", **model, "address": made.server_address}
        plain = made.generate("--prompt", "def", "--max-new-tokens", 3, "--ignore-eos", "--cache", tmp_path)
        assert plain.wait() == 0 and plain.err == ""
        document = made.generate(
            "--prompt", "def", "--max-new-tokens", 3, "--ignore-eos", "--cache", tmp_path, "--json", "--expect", told["model"]
        )
        assert document.wait() == 0 and document.err == ""
        result = json.loads(document.out)
        assert set(result) >= FIELDS and result["text"] + "\n" == plain.out and t.is_greedy([68, 69, 70], result["tokens"])
        assert result["traffic"]["setup"]["payload"] == 0
        refused = made.generate("--prompt", "def", "--expect", "f00", "--cache", tmp_path, "--json")
        assert refused.wait() == 3 and refused.out == "" and len(refused.said) == 1
        assert len(made.server.until_lines(2)) == 2 and "not the expected 'f00'" in made.server.lines[1]
        for process in (made.server, made.dealer):
            process.send(15)
            assert process.wait() == 0 and process.lines[-1].endswith(" stops")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSession]:
    session = LocalSession(t.lowered(), Options(cache=tmp_path_factory.mktemp("local"), timeout=30.0, chunk=4, pad_reply=3))
    with session:
        yield session
    parties = session.parties
    assert set(parties) == {"server", "client", "dealer"}
    for party in parties.values():
        assert set(party) == {"pid", "peak_rss_bytes", "traffic"} and party["peak_rss_bytes"] > 10**7
        assert set(party["traffic"]) == {"setup", "offline", "online"} and set(party["traffic"]["offline"]) == COUNTERS | {"dealer", "peer"}
    assert not t.running({party["pid"] for party in parties.values()})


def test_a_local_session(local: LocalSession) -> None:
    tokens = [token.id for token in local.generate("def main(", max_new_tokens=4, ignore_eos=True)]
    assert t.is_greedy(t.tokenizer().encode("def main(").ids, tokens)
    assert local.result is not None and local.result["tokens"] == tokens and local.result["padded"]["tokens"] == 6
    total, traffic = local.costs["total"], local.traffic
    assert (traffic["online"]["payload"], traffic["online"]["rounds"]) == (total["online_bytes"], total["rounds"])
    assert {op["layer"] for op in local.costs["ops"]} > {""}
    torch.testing.assert_close(local.run(torch.tensor([[9, 8, 7]]))[0], t.float_logits([9, 8, 7]), atol=LOGIT_ERROR, rtol=0)
    assert local.costs["total"]["online_bytes"] == local.traffic["online"]["payload"]


def test_a_local_session_drops_what_its_caller_turns_away_from(local: LocalSession, caplog: pytest.LogCaptureFixture) -> None:
    for _ in local.generate("def", max_new_tokens=25, ignore_eos=True):
        break
    tokens = [token.id for token in local.generate(ids=[1, 2], max_new_tokens=2, ignore_eos=True)]
    assert t.is_greedy([1, 2], tokens) and len(tokens) == 2
    with pytest.raises(ConfigError, match="the prompt is empty"):
        list(local.generate(""))
    assert not [record for record in caplog.records if record.name.startswith("privinf")]  # the error says it all
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = [token.id for token in local.generate(ids=[number], max_new_tokens=2, ignore_eos=True)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in (3, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert all(t.is_greedy([number], answers[number]) and len(answers[number]) == 2 for number in (3, 40))


def test_two_parties_alone_are_two_processes(tmp_path: Path) -> None:
    """With the real transfers and ciphertexts."""
    with privinf.local_session(t.lowered(), cache=tmp_path, trust="two-party", timeout=60.0) as session:
        tokens = [token.id for token in session.generate(ids=[1, 2, 3], max_new_tokens=2, ignore_eos=True)]
        traffic, total, result = session.traffic, session.costs["total"], session.result
    assert t.is_greedy([1, 2, 3], tokens) and result is not None and result["trust"] == "two-party"
    assert set(session.parties) == {"server", "client"}
    for phase in ("setup", "offline", "online"):
        assert traffic[phase]["payload"] == total[f"{phase}_bytes"]
    assert (traffic["offline"]["rounds"], traffic["online"]["rounds"]) == (total["offline_rounds"], total["rounds"])


def test_a_local_session_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model directory"), LocalSession(tmp_path / "none"):
        pass
    with pytest.raises(ConfigError, match="cannot read the link"), privinf.local_session(t.lowered(), link="fast"):
        pass
    with pytest.raises(ConfigError, match="has not been started"):
        list(LocalSession(t.lowered()).generate("x"))


@pytest.mark.slow
def test_from_a_script_without_a_main_guard_in_a_thread_and_from_elsewhere(tmp_path: Path) -> None:
    script = f"""
import sys, threading
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import privinf
def work():
    with privinf.local_session({str(t.lowered_directory())!r}, cache=__import__("pathlib").Path({str(tmp_path / "cache")!r})) as session:
        print([token.id for token in session.generate(ids=[1, 2], max_new_tokens=2, ignore_eos=True)])
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "random.py").write_text("raise SystemExit('not the standard library')")
    done = subprocess.run([sys.executable, "-P", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == "" and t.is_greedy([1, 2], json.loads(done.stdout))
