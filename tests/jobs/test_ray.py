"""A job on a cluster that loses workers: on Ray (the extra `ray`) with three nodes on one machine, and on one that is this process."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import privinf
from privinf.jobs import cluster
from privinf.jobs.batch import Progress
from privinf.session.cluster import aside, connect
from tests.support.cluster import Loses, Machines
from tests.support.gateway import ids_of
from tests.support.trio import Trio, is_greedy, keys

PROMPTS = ["ab", "Hello", "x = 1", "zz top"] * 4


@pytest.mark.slow
def test_what_a_lost_node_was_answering_others_answer(parties: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [machines.add_node(num_cpus=1) for _ in range(2)]
        machines.wait_for_nodes()
        lost = threading.Event()

        def lose(now: Progress) -> None:
            if now.done >= 4 and not lost.is_set():
                lost.set()
                machines.remove_node(nodes[0], allow_graceful=False)

        where: dict[str, Any] = {"server": parties.server.address, "dealer": parties.dealer.address, "keys": str(keys())}
        ray: dict[str, Any] = {"engine": "ray", "ray_address": machines.address, "sessions": 6}
        options = privinf.Options(cache=parties.cache)
        counts = privinf.batch(source, output, **where, **ray, max_new_tokens=3, ignore_eos=True, options=options, progress=lose)
    finally:
        import ray as running

        running.shutdown()
        machines.shutdown()
    assert lost.is_set() and (counts["answered"], counts["failed"]) == (len(PROMPTS), 0)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(int(each["custom_id"]) for each in found) == list(range(1, len(PROMPTS) + 1))
    for each in found:
        text = each["response"]["body"]["choices"][0]["text"]
        assert is_greedy(ids_of(PROMPTS[int(each["custom_id"]) - 1]), ids_of(text))


def test_a_cluster_that_is_not_there_is_one_line(parties: Trio, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("ab\n")
    where: dict[str, Any] = {"server": parties.server.address, "dealer": parties.dealer.address, "keys": str(keys())}
    options = privinf.Options(cache=parties.cache)
    with pytest.raises(privinf.ConfigError, match=r"Ray is not installed|no Ray cluster answers") as caught:
        privinf.batch(source, tmp_path / "out.jsonl", **where, engine="ray", ray_address="127.0.0.1:1", options=options)
    assert "\n" not in str(caught.value)


LOSSES: dict[str, Loses] = {
    "nobody": lambda method, count: "",
    "before": lambda method, count: "before" if (method, count) == ("answer", 4) else "",
    "after": lambda method, count: "after" if (method, count) in (("answer", 2), ("answer", 9)) else "",
    "while it starts": lambda method, count: "after" if (method, count) == ("version", 0) else "",
}


@pytest.mark.parametrize("who", LOSSES)
def test_several_prompts_of_a_lost_worker_are_answered_by_others(
    parties: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """On a cluster with room for two workers, five prompts at a time."""
    machines = Machines(LOSSES[who])
    machines.stand_in(monkeypatch, cluster)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[:8]))
    where: dict[str, Any] = {"server": parties.server.address, "dealer": parties.dealer.address, "keys": str(keys())}
    options = privinf.Options(cache=parties.cache)
    counts = privinf.batch(source, output, **where, engine="ray", sessions=5, max_new_tokens=2, ignore_eos=True, options=options)
    assert (counts["answered"], counts["failed"]) == (8, 0)
    assert (len(machines.made) > 2) == (who != "nobody") and {len(crew.workers) for crew in machines.made} == {3}
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(int(each["custom_id"]) for each in found) == list(range(1, 9))
    for each in found:
        text = each["response"]["body"]["choices"][0]["text"]
        assert is_greedy(ids_of(PROMPTS[int(each["custom_id"]) - 1]), ids_of(text))


def test_a_worker_of_another_version_is_one_line(parties: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machines().stand_in(monkeypatch, cluster)
    monkeypatch.setattr(cluster.Crew, "version", lambda self: "9.9.9")
    source = tmp_path / "in.txt"
    source.write_text("ab\n")
    where: dict[str, Any] = {"server": parties.server.address, "dealer": parties.dealer.address, "keys": str(keys())}
    options = privinf.Options(cache=parties.cache)
    with pytest.raises(privinf.ConfigError, match=r"a worker of the cluster has privinf 9\.9\.9"):
        privinf.batch(source, tmp_path / "out.jsonl", **where, engine="ray", options=options)


def test_workers_are_a_clusters(tmp_path: Path) -> None:
    with pytest.raises(privinf.ConfigError, match="workers are a cluster's"):
        privinf.batch(tmp_path / "in.txt", tmp_path / "out.jsonl", local=tmp_path, workers=2)


def test_ray_takes_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def init(**given: Any) -> None:
        taken.append(signal.signal(signal.SIGTERM, signal.SIG_DFL))

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))  # type: ignore[misc]
        connect("auto", 1.0)
        assert taken == [ours] and signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_ray_prints_is_no_part_of_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    with aside():
        print("(raylet) a node has been marked dead")
    print("{}")
    said = capsys.readouterr()
    assert said.out == "{}\n" and "marked dead" in said.err
