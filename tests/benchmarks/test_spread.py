"""Sweeps on a cluster: each task once, again where its worker was lost, and results where they were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import spread, stages
from benchmarks.training import ladder
from benchmarks.training.rows import Row
from protocols.errors import ConfigError
from tests.support.cluster import Machines

NODES = [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 4.0), (True, 2.0), (False, 1.0))]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    found = Machines(lambda method, count: "after" if (method, count) == ("do", 1) else "")
    found.nodes = lambda: NODES  # type: ignore[attr-defined]
    found.stand_in(monkeypatch, spread)
    monkeypatch.setenv("PYTHONPATH", "")
    return found


def squared(x: int, calls: list[int]) -> int:
    calls.append(x)
    return x * x


def test_a_lost_workers_task_is_done_again(machines: Machines) -> None:
    calls: list[int] = []
    found = list(spread.spread(squared, [(x, calls) for x in range(5)], workers=2, engine="ray"))
    assert sorted(found) == [(x, x * x) for x in range(5)] and len(calls) == 6 and len(machines.made) == 3


def test_processes_here_do_the_same_and_another_engine_is_none() -> None:
    assert sorted(spread.spread(divmod, [(7, 2), (9, 5)], workers=1)) == [(0, (3, 1)), (1, (1, 4))]
    with pytest.raises(ConfigError, match="there is no engine 'dask'"):
        next(spread.spread(divmod, [(7, 2)], workers=1, engine="dask"))


def test_rows_are_trained_on_a_cluster_and_not_again(
    tmp_path: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 300, "n_positions": 32}
    monkeypatch.setattr(ladder, "BASE", {"batch": 2, "length": 32, "warmup_steps": 2})
    stream = (np.arange(4000) % 300).astype(np.uint16)
    for name in ("training", "held_out"):
        np.save(tmp_path / f"{name}.npy", stream)
    (tmp_path / "corpus.json").write_text(json.dumps({"held_out_bytes": 8000, "sha256": "0", "files": 1}))
    given: dict[str, Any] = {"only": "fused", "sizes": sizes, "engine": "ray"}
    threads = torch.get_num_threads()
    try:
        ladder.train_rows(tmp_path, (Row("fused", "SM+ScFuFFN"), Row("other", "SM")), 2, 2, 2, **given)
        assert capsys.readouterr().out.count("perplexity") == 2
        results = {path: path.read_bytes() for path in tmp_path.glob("*/seed-*/result.json")}
        assert len(results) == 2 and all(json.loads(found)["steps"] == 2 for found in results.values())
        ladder.train_rows(tmp_path, (Row("fused", "SM+ScFuFFN"),), 2, 2, 2, **given)
    finally:
        torch.set_num_threads(threads)
    assert {path: path.read_bytes() for path in results} == results
    with pytest.raises(ConfigError, match="has no corpus on this machine"):
        ladder.train_row(tmp_path / "elsewhere", Row("fused", "SM+ScFuFFN"), 1, 2, sizes)


def test_stages_have_a_node_each_and_leave_their_results_here(
    tmp_path: Path, machines: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [stages.Stage(name, (name,), 1) for name in ("a", "b", "c")]
    asked: list[str] = []

    def there(stage: stages.Stage, path: Path) -> tuple[int, bytes | None, bytes]:
        asked.append(stage.name)
        return (2, None, b"error: out of luck\n") if stage.name == "b" else (0, stage.name.encode(), b"")

    monkeypatch.setattr(stages, "measure_there", there)
    with pytest.raises(ConfigError, match="no stage left a result"):  # what these wrote is none
        stages.everything(chosen, tmp_path, fresh=False, engine="ray")
    assert sorted(asked) == ["a", "b", "b", "c"] and len(machines.made) == 3  # two nodes, one of which was lost
    assert (tmp_path / "a.json").read_bytes() == b"a" and not (tmp_path / "b.json").exists()
    assert "b ended with 2 (error: out of luck" in capsys.readouterr().err


def test_a_stage_elsewhere_gives_back_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    path, words = Path("runs") / "a.json", list[str]()

    def run(asked: list[str], log: Path, most_s: float) -> int:
        words.extend(asked)
        log.write_text("all is well\n")
        path.write_text("{}")
        return 0

    monkeypatch.setattr(stages, "_run", run)
    assert stages.measure_there(stages.Stage("a", ("a",), 1), path) == (0, b"{}", b"all is well\n")
    assert words[-1] == str(path), "the result's command is that of a run here"
