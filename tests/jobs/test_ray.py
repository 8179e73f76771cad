"""A job on a Ray cluster of three nodes on one machine, of which one is removed midway; needs the extra `ray`."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import privinf
from privinf.jobs.batch import Progress
from privinf.session.cluster import aside
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
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        lost = threading.Event()

        def lose(now: Progress) -> None:
            if now.done >= 4 and not lost.is_set():
                lost.set()
                cluster.remove_node(nodes[0], allow_graceful=False)

        where: dict[str, Any] = {"server": parties.server.address, "dealer": parties.dealer.address, "keys": str(keys())}
        ray: dict[str, Any] = {"engine": "ray", "ray_address": cluster.address, "sessions": 3}
        options = privinf.Options(cache=parties.cache)
        counts = privinf.batch(source, output, **where, **ray, max_new_tokens=3, ignore_eos=True, options=options, progress=lose)
    finally:
        import ray as running

        running.shutdown()
        cluster.shutdown()
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


def test_what_ray_prints_is_no_part_of_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    with aside():
        print("(raylet) a node has been marked dead")
    print("{}")
    said = capsys.readouterr()
    assert said.out == "{}\n" and "marked dead" in said.err
