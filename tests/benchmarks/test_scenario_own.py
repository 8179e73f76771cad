"""A scenario that is defined here: its figures are written and read back, also where it breaks off, and what it requires is held."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measure import Run
from benchmarks.perform import perform
from benchmarks.schema import Absent, read
from protocols.errors import PrivinfError


def own(run: Run, work: Path, *, most: float, fails: bool = False) -> None:
    """One figure, one bound and one thing that is missing."""
    (work / "scratch").write_text("gone afterwards")
    run.measure("own figure", 2.5, "s", of="nobody")
    run.require("own bound", "s", most, 2.5)
    run.absent.append(Absent("own gap", "nothing measures it"))
    if fails:
        raise OSError("out of luck")


def performed(file: Path, *, most: float = 3.0, fails: bool = False) -> None:
    perform("own", (file, None, file.with_suffix(".md")), lambda run, work: own(run, work, most=most, fails=fails))


def test_its_result_has_what_it_added(tmp_path: Path) -> None:
    performed(tmp_path / "own.json")
    result = read(tmp_path / "own.json")
    assert (result.scenario, result.complete) == ("own", True)
    assert [(m.name, m.value, m.unit, m.of) for m in result.measures] == [("own figure", 2.5, "s", "nobody")]
    assert [goal.name for goal in result.budget] == ["own bound"] and [gap.what for gap in result.absent] == ["own gap"]
    assert "own figure" in (tmp_path / "own.md").read_text()


def test_what_it_requires_fails_the_command_once_the_result_is_written(tmp_path: Path) -> None:
    with pytest.raises(PrivinfError, match=r"own bound: 2\.5 s, and at most 2 may be"):
        performed(tmp_path / "own.json", most=2.0)
    assert read(tmp_path / "own.json").complete


def test_what_it_found_is_kept_where_it_breaks_off(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="out of luck"):
        performed(tmp_path / "own.json", fails=True)
    assert not read(tmp_path / "own.json").complete
