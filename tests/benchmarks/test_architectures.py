"""Networks of several families are trained alike, their costs are those of `explain`, and the page's tables and picture show them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.training import architectures, compared, ladder
from benchmarks.training.rows import Row
from privinf.client.client import Client
from privinf.lowering.lowered import Lowered
from privinf.models.checkpoint import load_checkpoint
from privinf.session.options import Options
from privinf.session.pace import Pace, Speeds
from privinf.trust import DEALER
from tests.support import trio as t

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300, "n_positions": 36}
ROWS = (Row("AERO: `SM+ScFuFFN`", "SM+ScFuFFN"), Row("Llama: `SM+ScFuFFN`", "SM+ScFuFFN", family="llama", sizes={"n_embd": 24}))
PACE = Pace(*[Speeds(1e-2, 2e-3, 1e-9, 1e-8, 1e-8, 1e-9)] * 3, table_s=1e-6, load=0.0, at=0.0)  # of no machine


@contextmanager
def in_threads(lowered: Lowered, options: Options) -> Iterator[Client]:
    """As `LocalSession`, without processes: how long these may take to load is no matter of this test."""
    with t.trio(lowered, cache=options.cache) as parties, parties.client(chunk=options.chunk) as client:
        yield client


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ladder, "BASE", {"batch": 2, "length": 32, "warmup_steps": 2})
    for name, value in {"ROWS": ROWS, "SIZES": SIZES, "LONG": 80, "PROMPT": 8, "FURTHER": (8, 79), "TOKENS": 2, "ASKED": 1}.items():
        monkeypatch.setattr(architectures, name, value)
    monkeypatch.setattr(compared, "NEAR", "token at 8")
    monkeypatch.setattr(compared, "FAR", "token at 79")
    for name in ("training", "held_out"):
        np.save(tmp_path / f"{name}.npy", (np.arange(4000) % 300).astype(np.uint16))
    (tmp_path / "corpus.json").write_text(json.dumps({"held_out_bytes": 8000, "sha256": "0", "files": 1}))
    threads = torch.get_num_threads()
    for row in ROWS:
        ladder.train_row(tmp_path, row, 1, 3, SIZES)
    torch.set_num_threads(threads)
    return tmp_path


def test_rows_of_two_families_are_priced_and_shown(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "LocalSession", in_threads)
    monkeypatch.setattr(architectures, "pace_of", lambda cache, anew=False: PACE)
    monkeypatch.setattr(architectures.kernels, "load", lambda directory: None)
    target = trained / "shown" / "architectures.json"
    architectures.gather(trained, target, 3)
    architectures.time_rows(trained, target)
    found = json.loads(target.read_text())
    assert [row["family"] for row in found["rows"]] == ["aero", "llama"]
    model, config, _ = load_checkpoint(trained / ROWS[1].slug / "seed-1" / "checkpoint")
    assert found["rows"][1]["parameters"] == sum(each.numel() for each in model.parameters()) and config.n_embd == 24
    for row in found["rows"]:
        near, far = row["costs"][DEALER]["token at 8"], row["costs"][DEALER]["token at 79"]
        assert 0 < near["online_bytes"] < far["online_bytes"] and row["seconds"]["token"] > 0
    for make in (compared.quality, compared.cost, compared.alone, compared.times):
        text = make(found)
        assert all(f"| {row.name} |" in text for row in ROWS)
    assert "AERO: SM+ScFuFFN" in compared.picture(found).get_label()  # type: ignore[union-attr]


def test_a_stretched_network_computes_the_same(trained: Path) -> None:
    model, config, _ = load_checkpoint(trained / ROWS[0].slug / "seed-1" / "checkpoint")
    longer, stretched = architectures.stretched(model, config, 80)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(longer(ids), model.eval()(ids))
    torch.testing.assert_close(longer.state_dict()["wpe.weight"][36:72], model.state_dict()["wpe.weight"])
    assert stretched.n_positions == 80


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3.0, 5.0), (1.0, 9.0), (2.0, 9.5), (2.5, 7.0), (4.0, 5.0), (5.0, 4.0)]
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert compared.front(points) == sorted(set(points) - beaten)
