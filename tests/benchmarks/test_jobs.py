"""Jobs that are killed, and queries prepared on a cluster, as the harness measures them: what it counts as wrong, and that both run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.measure import Run
from benchmarks.scenarios import jobs
from benchmarks.scenarios.farm import bound, farm, processor_s
from benchmarks.scenarios.jobs import Extent, faults
from tests.support.trio import lowered_directory

PROMPTS, KILLS = int(os.environ.get("PRIVINF_JOB_PROMPTS", "12")), int(os.environ.get("PRIVINF_JOB_KILLS", "2"))


@pytest.mark.parametrize(
    ("found", "counted"),
    [
        ({"1": ["a"], "2": ["b"]}, (0, 0)),
        ({"1": ["a"]}, (1, 0)),
        ({"1": ["a", "a"], "2": ["b"]}, (1, 0)),
        ({"1": ["a"], "2": ["b"], "3": ["c"]}, (1, 1)),
        ({"1": ["b"], "2": ["a"]}, (0, 2)),
    ],
)
def test_what_is_lost_doubled_or_mixed_up_counts(found: dict[str, list[str]], counted: tuple[int, int]) -> None:
    assert faults(["a", "b"], found) == counted


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """PRIVINF_JOB_PROMPTS and PRIVINF_JOB_KILLS say how many; of the shipped model, `python -m benchmarks jobs` does it."""
    run = Run("jobs")
    jobs.jobs(run, tmp_path, model=lowered_directory(), extent=Extent(PROMPTS, 3, 2, KILLS, alone=2))
    assert not run.broken and [goal.measured for goal in run.budget] == [0, 0, 0, 0]
    measured = {each.name: each.value for each in run.measures}
    assert measured["prompts"] == PROMPTS and 0 <= measured["kills"] <= KILLS


@pytest.mark.slow
def test_a_cluster_of_which_a_node_is_removed_and_one_that_prepares(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run = Run("jobs")
    jobs.jobs(run, tmp_path / "jobs", model=lowered_directory(), extent=Extent(PROMPTS, 3, 3, 0, nodes=3, alone=2))
    farm(run, tmp_path / "farm", model=lowered_directory(), counts=[1, 2], each=2, seq=3, tokens=2)
    assert not run.broken
    rates = [each.value for each in run.measures if each.name == "prepared queries a second"]
    assert len(rates) == 2 and min(rates) > 0


def test_what_bounds_a_farm() -> None:
    assert bound(2, 0.5, 0.05, 0.1) == 4 and bound(8, 0.5, 0.05, 0.1) == 10 and bound(16, 0.5, 0.05, 0.1, dealers=4) == 20
    before = processor_s([os.getpid()])
    sum(number * number for number in range(3_000_000))
    assert processor_s([os.getpid()]) > before > 0 and processor_s([1 << 22]) == 0
