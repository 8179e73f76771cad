"""Logits and tokens against float: what is counted, that a run goes on where another ended, and what is no wrong token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.measure import Run
from benchmarks.scenarios import precision as scenario
from benchmarks.scenarios.precision import BOUNDS, FURTHER, Extent, precision
from protocols.errors import ConfigError
from tests.support import trio as t
from tests.support.ladder import LOGIT_ERROR


def figures(run: Run) -> dict[tuple[str, str], float]:
    return {(measure.of.split(",")[0], measure.name): measure.value for measure in run.measures}


def test_all_is_counted_and_a_second_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six prompts, one of them continued and one by the argmax on shares, and two passes of a network; its line is cut off afterwards."""
    monkeypatch.setattr(scenario, "held_out", lambda network, model: list(range(t.VOCAB)) * 3)
    keep = tmp_path / "kept.jsonl"
    extent = Extent(prompts=6, networks=1, each=2, keep=keep)
    run = Run("precision")
    precision(run, tmp_path, model=t.checkpoint(), extent=extent)
    found = figures(run)
    shown = next(goal for goal in run.budget if "trained" in goal.name)
    tokens = sum(found["a trained model", f"tokens: {kind}"] for kind in ("same", "tie", "wrong"))
    assert 6 <= tokens <= 6 + 2 * FURTHER and shown.name == f"worst logit error of {int(tokens) - 1} passes of a trained model"
    assert found["a trained model", "tokens: wrong"] == found["random networks", "tokens: wrong"] == 0
    assert 0 < found["a trained model", "worst logit error"] < LOGIT_ERROR
    assert found["a trained model", "worst logit error"] == max(
        found["a trained model", f"worst logit error: {kind}"] for kind in ("text", "random tokens", "a further token")
    )
    assert [(goal.must, goal.goal) for goal in run.budget] == [BOUNDS["trained"], BOUNDS["random"]]

    lines = keep.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 6 + 1
    keep.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    monkeypatch.setattr(scenario, "LocalSession", None)  # the model's prompts are all there
    again = Run("precision")
    precision(again, tmp_path, model=t.checkpoint(), extent=extent)
    assert again.budget[0] == run.budget[0] and keep.read_bytes().splitlines(keepends=True)[:-1] == lines[:-1]
    assert not again.absent and set(figures(again)) == set(found)

    with pytest.raises(ConfigError, match="another commit, model or number"):
        precision(Run("precision"), tmp_path, model=t.checkpoint(), extent=Extent(6, 1, each=3, keep=keep))


def test_what_was_not_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scenario.Query("random", 0, (scenario.Passed("SM+G", 3, "wrong", 0.5),))
    monkeypatch.setattr(scenario, "_random", lambda number, *_: made)
    run = Run("precision")
    precision(run, tmp_path, model=t.checkpoint(), extent=Extent(prompts=0, networks=3, minutes=1e-9))
    assert [gap.what for gap in run.absent] == ["3 of 3 queries, random networks"] and not run.budget
    run = Run("precision")
    precision(run, tmp_path, model=t.checkpoint(), extent=Extent(prompts=0, networks=1))
    assert [gap.what for gap in run.absent] == ["random 0 within the bound"] and run.budget[0].measured == 0.5


@pytest.mark.parametrize(("token", "says"), [(0, "same"), (1, "tie"), (2, "wrong")])
def test_a_tie_is_no_wrong_token(token: int, says: str) -> None:
    wanted = torch.tensor([2.0, 2.0 - 1.9 * BOUNDS["trained"][0], 1.0], dtype=torch.float64)
    assert scenario._passed("text", 1, wanted, None, token, "trained").token == says


def test_a_file_that_is_no_ledger_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.jsonl").write_text('{"some": "line"}\n')
    assert main(["precision", str(t.checkpoint()), "--prompts", "0", "--networks", "1", "--keep", str(tmp_path / "other.jsonl")]) == 2
    assert "is no ledger" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
