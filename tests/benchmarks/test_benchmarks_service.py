"""What the harness says of generation as a service and of the soak: that its checks fail where they must, and that both run."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as command
from benchmarks.__main__ import main
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.callers import Answer, Clear, clear_prompts, clear_reply
from benchmarks.deployment import Footprint, alarms, state_of
from benchmarks.measure import Run
from benchmarks.networks import made
from benchmarks.report import as_markdown, sections
from benchmarks.scenarios.batch import batch
from benchmarks.scenarios.serving import clients, crowd, growth, memory, one_more_token, wan, wrong
from benchmarks.scenarios.soak import Level, Tally, _judge, falls, leaks
from benchmarks.schema import Measure, Result, encode, read
from benchmarks.visitors import GOOD, KINDS, Report, Visitor
from privinf.lowering.explain import explain
from protocols.errors import ConfigError, TransportError
from tests.support.waiting import wait_for

SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 64}
QUIET = Footprint(rss=200 << 20, threads=4, files=9, sockets=6)


# ---- what is asked of visitors


def told(**fields: Any) -> Report:
    return Report(**{"replies": [([1, 2], [1, 2])], "tokens": 2, "once": [b"seed", b"pass 1", b"pass 2"], **fields})


@pytest.mark.parametrize(
    ("kind", "report", "field"),
    [
        ("reply", told(replies=[([1, 3], [1, 2])]), "wrong"),
        ("turns", told(replies=[([1, 2], [1, 2]), ([4], [5])]), "wrong"),
        ("stream", told(replies=[("text", "other")]), "wrong"),
        ("reply", told(once=[b"seed", b"pass 1", b"pass 1"]), "twice"),
        ("reply", told(once=[b"an earlier seed", b"pass 1", b"pass 2"]), "twice"),
        ("reply", told(once=[]), "unproved"),
        ("reply", told(error="the peer ended the session"), "failed"),
        ("gateway", told(replies=[]), "failed"),
        ("newcomer", None, "failed"),
        ("bad_http", Report(status=500), "faults"),
        ("bad_http", Report(status=200), "admitted"),
    ],
)
def test_a_visitor_that_was_wronged_counts(kind: str, report: Report | None, field: str) -> None:
    tally = Tally(seen={b"an earlier seed"})
    tally.take("reply", told(once=[b"a", b"b", b"c"]))
    tally.take("die", None)
    tally.take("frames", Report(error="the peer gave up"))
    fields = ("wrong", "twice", "unproved", "failed", "faults", "admitted", "hung")
    assert not any(getattr(tally, name) for name in fields)
    tally.take(kind, report)
    assert [name for name in fields if getattr(tally, name)] == [field]


def test_a_visitor_that_hangs_counts_whatever_it_is() -> None:
    tally = Tally()
    tally.take("frames", None, hung=True)
    tally.take("reply", None, hung=True)
    assert tally.hung == ["frames", "reply"] and not tally.failed


def test_every_kind_of_visitor_can_be_sent() -> None:
    assert set(GOOD) < set(KINDS) and all(isinstance(getattr(Visitor, kind), Callable) for kind in KINDS)  # type: ignore[arg-type]


# ---- what is asked of parties


def test_a_leaked_file_socket_or_thread_is_noticed(tmp_path: Path) -> None:
    before = {"server": state_of(os.getpid())}
    done = threading.Event()
    with socket.socket(), (tmp_path / "kept").open("w"):
        thread = threading.Thread(target=done.wait)
        thread.start()
        found = leaks(before, {"server": state_of(os.getpid())})
        done.set()
        thread.join()
    assert [line.split(" more")[0] for line in found] == ["server: 1 threads", "server: 2 files", "server: 1 sockets"]
    wait_for(lambda: not leaks(before, {"server": state_of(os.getpid())}))  # a thread that was joined is about to end
    with pytest.raises(TransportError, match="has ended"):
        state_of(1 << 22)


def test_faults_of_a_partys_own_are_noticed_in_its_log() -> None:
    good = (
        "server listens on 127.0.0.1:1\n2026-01-01 00:00:00,000 privinf.server: the peer does not speak TLS (at server, peer 127.0.0.1:2)\n"
    )
    assert not alarms(good)
    bad = "Traceback (most recent call last):\nKeyError: 3\nprivinf.dealer: internal error in a session: KeyError\n"
    assert len(alarms(good + bad)) == 3


def test_figures_from_samples() -> None:
    assert falls([1, 2, 2, 5]) == 0 and falls([1, 3, 2, 1]) == 2
    assert growth([900, 100, 101, 99, 100, 102, 130, 131, 129], 1) > 25 and growth([900, 100, 101, 100, 99, 101, 100], 1) == pytest.approx(
        0
    )
    answers = [Answer([1, 2], 10.0, [11.0, 13.0]), Answer([3, 4], 10.5, [12.5, 14.0])]
    seen = crowd(answers)
    assert (seen.rate, seen.first, seen.between) == (1.0, 2.0, 2.0)
    prompts = [Clear([7], [1, 2]), Clear([8], [3, 5])]
    assert wrong(answers, prompts) == 1


class FakeSwarm:
    def __init__(self, tally: Tally) -> None:
        self._tally, self.unsettled = tally, 0
        self.memory = {"server": [2e8, 2.1e8]}
        self.spent = {"server": [1.0, 5.0], "dealer": [2.0, 6.0]}


def judged(network: Any, tally: Tally, last: Footprint = QUIET, spent: float = 5.0, logs: list[str] | None = None) -> Run:
    run = Run("soak")
    levels = [Level(float(at), {"server": QUIET if at < 3 else last}) for at in range(4)]
    _judge(run, network, FakeSwarm(tally), levels, {"server": spent, "dealer": 6.0}, {"server": logs or []})  # type: ignore[arg-type]
    return run


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made("SM(t)+ScFuFFN", tmp_path_factory.mktemp("network"), **SMALL)


def test_a_soak_is_judged(network: Any, tmp_path: Path) -> None:
    """What it must keep is in the result, and each breach ends it."""
    tally = Tally()
    tally.take("reply", told())
    good = judged(network, tally)
    assert not good.broken and len(good.budget) > 8
    text = as_markdown(sections([good.result(True)]))
    assert "## Soak" in text and "threads when nobody is there" in text
    (tmp_path / "soak.json").write_bytes(encode(good.result(True)))
    assert read(tmp_path / "soak.json").scenario == "soak"
    for broken in (
        judged(network, tally, Footprint(QUIET.rss, 5, 9, 6)),
        judged(network, tally, Footprint(QUIET.rss, 4, 10, 6)),
        judged(network, tally, Footprint(QUIET.rss + (100 << 20), 4, 9, 6)),
        judged(network, tally, spent=7.0),
        judged(network, tally, logs=["Traceback"]),
    ):
        assert len(broken.broken) == 1
    with pytest.raises(TransportError, match="no visitor got a reply"):
        judged(network, Tally())


def test_a_command_whose_run_breaks_what_it_must_keep_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is written, and is complete."""

    def broken(run: Run, *_: Any, **__: Any) -> None:
        run.require("replies that differ", "", 0, 2)

    monkeypatch.setattr("benchmarks.scenarios.soak.soak", broken)
    path = tmp_path / "soak.json"
    assert command.main(["soak", "--json", str(path)]) == 4
    assert "soak: replies that differ: 2, and at most 0 may be" in capsys.readouterr().err
    assert read(path).complete and read(path).budget[0].measured == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "--parts", "nosuch"], "no part 'nosuch'"),
        (["generate", "--lengths", "1,x"], "no list of whole numbers"),
        (["soak", "--minutes", "0"], "--minutes"),
        (["soak", "no/such/model"], "no model directory"),
    ],
)
def test_errors_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


# ---- both run


def test_clear_prompts(network: Any) -> None:
    """Each token of a reply is float's best by far, and a reply that is not is none."""
    found = clear_prompts(network, 3, 4, 3)
    assert len(found) == len({tuple(one.ids) for one in found}) == 3
    for one in found:
        for place, token in enumerate(one.reply):
            best = network.floats(one.ids + one.reply[:place]).topk(2)
            assert int(best.indices[0]) == token and float(best.values[0] - best.values[1]) >= 0.1
        assert clear_reply(network, one.ids, 3) == one.reply
    with pytest.raises(ConfigError, match="have replies of 60 clear tokens"):
        clear_prompts(network, 400, 4, 60)


def test_one_reply_and_a_batch_are_warmed_up_alike(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first of each has processes of its own."""
    asked: list[list[int]] = []
    totals = {count: explain(network.lowered, 32, new_tokens=count, batch=3)["total"] for count in (4, 9)}

    class Session(contextlib.nullcontext[Any]):
        def __init__(self, *_: object) -> None:
            super().__init__(self)
            asked.append([])
            self.traffic: dict[str, dict[str, int]] = {}

        def generate(self, *, ids: list[Any], max_new_tokens: int, ignore_eos: bool) -> Iterator[int]:
            asked[-1].append(len(ids) if isinstance(ids[0], list) else 1)
            self.traffic["online"] = {"payload": totals[max_new_tokens]["online_bytes"], "rounds": totals[max_new_tokens]["rounds"]}
            return iter(range(asked[-1][-1] * max_new_tokens))

    monkeypatch.setattr("benchmarks.scenarios.batch.LocalSession", Session)
    run = Run("generate")
    batch(run, network, number=3, tokens=(4, 9, 4), samples=2)
    assert asked == [[1, 3] * 3, [1, 3] * 3, [1], [3]] and not run.broken
    rate = "tokens a second over one client's, at least"
    assert [goal.name for goal in run.budget if rate in goal.name] == [f"a batch of 3: {rate}", f"a batch of 3, 9 tokens each: {rate}"]
    assert {m.name for m in run.measures if m.name.endswith("of a process")} == {
        "one reply, tokens a second, the first of a process",
        "a batch of 3, tokens a second, the first of a process",
        "a batch of 3, times one reply's rate, each the first of a process",
    }


@pytest.mark.slow
def test_clients_at_once_are_measured(network: Any, tmp_path: Path) -> None:
    run = Run("generate")
    clients(run, network, tmp_path, counts=(2,), tokens=3, samples=1)
    assert not run.broken
    found = {(m.name, m.of): m for m in run.measures}
    assert (
        found["tokens a second, all clients", "2 clients"].value > 0 and len(found["tokens a second, all clients", "1 client"].samples) == 2
    )
    assert {goal.name.split(":")[0] for goal in run.budget} >= {"2 clients", "of 4 replies, not the single client's"}
    assert "Generation as a service" in as_markdown(sections([run.result(True)]))


@pytest.mark.slow
def test_a_token_over_a_link_and_apart(network: Any) -> None:
    """The model is of the online phase alone, so that no time can be below it; bytes and rounds are those of one token."""
    run = Run("generate")
    wan(run, network, name="4ms:200", seq=8, tokens=2)
    with PrivinfBackend(network, 8) as used:
        used.once(network.ids(8))
        one_more_token(run, network, used, samples=1)
    found = {(m.of, m.name): m.value for m in run.measures}
    total = [explain(network.lowered, 8, new_tokens=count)["total"] for count in (1, 2)]
    assert found["GPT-2 size", "one more token, rounds"] == total[1]["rounds"] - total[0]["rounds"]
    assert found["GPT-2 size", "one more token, bytes"] > total[1]["online_bytes"] - total[0]["online_bytes"]
    assert found["over a link", "rounds x RTT / 2 + bytes / rate"] > (total[1]["rounds"] - total[0]["rounds"]) * 0.002
    assert found["over a link", "one more token, seconds"] > found["over a link", "rounds x RTT / 2 + bytes / rate"]
    names = [goal.name for goal in run.budget]
    assert names[0].startswith("a token over 4 ms, 200 Mbit/s") and names[1].startswith("GPT-2 size, a token with 8 cached")


def test_the_budget_is_measured_with_a_further_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own path, at a size that fits a test; what it leaves is what the report's sections read."""
    monkeypatch.setattr("benchmarks.scenarios.budget.GPT2", {**SMALL, "n_layer": 12})
    path = tmp_path / "budget.json"
    assert main(["budget", "--seq", "4", "--samples", "1", "--positions", "16", "--json", str(path)]) == 0
    result = read(path)
    built = [goal for goal in result.budget if goal.why != "not built"]
    assert len(built) == 16 and all(goal.measured for goal in built)
    text = as_markdown(sections([result]))
    assert "## The byte budget at GPT-2 size" in text and "**One more token of SM+ScFuFFN_i6**" in text


@pytest.mark.slow
def test_memory_is_measured(network: Any, tmp_path: Path) -> None:
    run = Run("generate")
    memory(run, network, tmp_path, tokens=20, sessions=5)
    parties = {m.of for m in run.measures if m.name == "memory, growth over 5 sessions" and len(m.samples) == 5}
    assert parties == {"server", "client", "dealer"}


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    """Half a minute leaves nothing behind; its memory is not judged here, since a minute does not warm it up."""
    path = tmp_path / "soak.json"
    code = main(["soak", "models/pylib", "--minutes", "0.5", "--json", str(path)])
    result: Result = read(path)
    broken = [goal.name for goal in result.budget if goal.measured is None or goal.measured > goal.must]
    assert [name for name in broken if not name.startswith("memory")] == [] and code == (4 if broken else 0)
    assert all(isinstance(m, Measure) for m in result.measures)
