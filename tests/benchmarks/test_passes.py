"""Many private passes on text, every logit against float: the scenario on a tiny model, and the thousand passes of the shipped one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.choose import BOUND
from benchmarks.measure import Run
from benchmarks.scenarios.passes import passes
from tests.support import trio as t
from tests.support.ladder import LOGIT_ERROR

ROOT = Path(__file__).resolve().parents[2]


def test_every_pass_is_counted_and_drawn(tmp_path: Path) -> None:
    run = Run("passes")
    passes(run, tmp_path, model=t.checkpoint(), count=4)
    found = {measure.name: measure for measure in run.measures}
    worst = found["worst logit error"]
    assert [(goal.must, goal.goal, goal.measured) for goal in run.budget] == [(0.01, 0.005, worst.value)]
    assert len(worst.samples) == 4 and worst.value == pytest.approx(max(worst.samples), abs=1e-6) and 0 < worst.value < LOGIT_ERROR
    assert found[f"passes with a logit off by more than {BOUND}"].value == len(run.absent) == sum(x > BOUND for x in worst.samples)
    assert found["99.9 % of all logits' errors are below"].value <= worst.value
    assert any(f"{4 * t.VOCAB:,} in all" in note for note in run.notes)
    figure = plots.passes([run.result(complete=True)])
    assert figure is not None and sum(bar.get_height() for bar in figure.axes[0].patches) == 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_passes_of_the_shipped_model(tmp_path: Path) -> None:
    """Not one logit off by more than 0.02; about ten minutes on two idle cores."""
    run = Run("passes")
    passes(run, tmp_path, model=ROOT / "models" / "pylib", count=1000)
    (worst,) = [measure for measure in run.measures if measure.name == "worst logit error"]
    assert not run.absent and len(worst.samples) == 1000 and worst.value < 0.02 < BOUND
