"""The page of the road says what the files beside it say, and the driver of the ladder trains, stops where a row diverges, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.training import ladder, page
from benchmarks.training.rows import GPT2, ROWS, SMALL, STRUCTURES, Row, config_of
from privinf.models.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_pages_have_what_the_files_have() -> None:
    names = []
    for data in (ROOT / "docs" / "softmax-only", ROOT / "docs" / "architectures"):
        text = data.with_suffix(".md").read_text("utf-8")
        assert page.filled(text, data) == text
        names += [match["name"] for match in page.MARKED.finditer(text)]
    assert sorted(names) == sorted(page.TABLES)


def test_the_rows_are_networks_of_the_ladder() -> None:
    assert len({row.slug for row in ROWS}) == len(ROWS)
    assert {config_of(row.variant, SMALL).variant for row in ROWS} == {row.variant for row in ROWS}
    assert len({config_of(name, GPT2).variant for name in STRUCTURES}) == len(STRUCTURES)


def test_rows_are_trained_once_gathered_and_what_diverges_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300, "n_positions": 32}
    rows = (Row("fused", "SM+ScFuFFN", aero=3.48), Row("too fast", "SM", {"learning_rate": 1e30, "clip": 1e30}, diverges_at_aero=True))
    monkeypatch.setattr(ladder, "ROWS", rows)
    monkeypatch.setattr(ladder, "SMALL", sizes)
    monkeypatch.setattr(ladder, "BASE", {"batch": 2, "length": 32, "warmup_steps": 2})
    stream = (np.arange(4000) % 300).astype(np.uint16)
    for name in ("training", "held_out"):
        np.save(tmp_path / f"{name}.npy", stream)
    (tmp_path / "corpus.json").write_text(json.dumps({"held_out_bytes": 8000, "sha256": "0", "files": 1}))
    threads = torch.get_num_threads()
    try:
        runs = [ladder.train_row(tmp_path, row, seed, 4, sizes) for row in rows for seed in (1, 2)]
        assert [ladder.train_row(tmp_path, row, seed, 4, sizes) for row in rows for seed in (1, 2)] == runs  # not again
    finally:
        torch.set_num_threads(threads)
    assert [run["diverged"] is None for run in runs] == [True, True, False, False]
    assert load_checkpoint(tmp_path / "fused" / "seed-1" / "checkpoint")[1].variant == "SM+ScFuFFN"
    ladder.gather(tmp_path, tmp_path / "ladder.json", 4)
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["rows"][0]["perplexity"] > 1 and found["rows"][0]["spread"] >= 0 and "perplexity" not in found["rows"][1]
    table = page.filled("<!-- table: ladder -->\nold\n<!-- end -->\n", tmp_path)
    assert "| `fused` |" in table and "diverged, 2 of 2" in table and "NaN" in table and "old" not in table
