"""The stages of a whole run of the harness: what fails, is interrupted or takes too long, and comparisons of two results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from benchmarks import machine, stages
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.measure import Run
from benchmarks.schema import Result, Row, encode, totals_of
from protocols.errors import ConfigError


def remade(result: Result, rows: Sequence[Row]) -> Result:
    """The result with other rows, and the totals that follow; the sockets' counters are left out."""
    seconds = {(total.setting, total.phase): total.samples for total in result.totals}
    return replace(result, rows=tuple(rows), totals=tuple(totals_of(rows, seconds)), sockets=())


def test_compare_finds_what_grew(run: Run, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Payload and rounds exactly, bytes beyond what TLS says; seconds alone are no regression."""
    result = run.result(True)

    def changed(**more: Any) -> Result:
        """The first row of ours online at the client that has payload, changed."""
        at = next(i for i, r in enumerate(result.rows) if (r.backend, r.phase, r.party) == ("privinf", "online", "client") and r.payload)
        row = result.rows[at]
        row = msgspec.structs.replace(row, **{name: getattr(row, name) + by for name, by in more.items()})
        return remade(result, [*result.rows[:at], row, *result.rows[at + 1 :]])

    assert compare(result, result) == (compare(result, result)[0], False)
    assert "are the same" in compare(result, result)[0]
    for worse in (changed(payload=1), changed(rounds=1), changed(bytes_sent=100_000)):
        text, regressed = compare(result, worse)
        assert regressed and "regression" in text
        text, regressed = compare(worse, result)
        assert not regressed and "better" in text
    assert not compare(result, changed(bytes_sent=50))[1]
    slow = [msgspec.structs.replace(t, seconds=99.0, samples=(99.0, 98.0)) if t.samples else t for t in result.totals]
    text, regressed = compare(result, msgspec.structs.replace(result, totals=tuple(slow)))
    assert not regressed and "beyond noise" in text
    assert compare(result, remade(result, [r for r in result.rows if r.backend != "crypten"]))[1]
    worse_file = tmp_path / "worse.json"
    worse_file.write_bytes(encode(changed(payload=1)))
    assert main(["compare", str(saved), str(worse_file)]) == 1 and main(["compare", str(saved), str(saved)]) == 0
    capsys.readouterr()
    with pytest.raises(ConfigError, match="different scenarios"):
        compare(result, msgspec.structs.replace(result, scenario="other"))


def test_stages_are_kept_failed_or_interrupted(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete result of this commit and these words is kept, a stage that fails stops no other, Ctrl-C does."""
    asked: list[str] = []
    chosen = [stages.Stage(name, (name,), 1) for name in ("a", "b")] + [stages.Stage("c", ("c",), 30, long=True)]
    now = msgspec.structs.replace(
        run.result(True), commit="now", command=f"python -m benchmarks a --json {tmp_path / 'a.json'}".replace(str(tmp_path), "...")
    )

    def process(code: int) -> Any:
        def run(words: list[str], log: Path, most_s: float) -> int:
            asked.append(words[3])
            log.write_text("the first line\nerror: the last line\n")
            return code

        return run

    def save(**changes: Any) -> None:
        (tmp_path / "a.json").write_bytes(encode(msgspec.structs.replace(now, **changes)))

    def everything(code: int, **more: Any) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(stages, "_run", process(code))
        asked.clear()
        _, lacking = stages.everything(chosen, tmp_path, **{"fresh": False, **more})
        return list(asked), lacking

    monkeypatch.setattr(machine, "commit", lambda: "now")
    save()
    assert everything(2) == (["b"], ["b"])
    assert everything(2, named=["b"]) == (["b"], ["b"])  # the report is of all results, whatever was run now
    save(complete=False)
    with pytest.raises(ConfigError, match="no stage left a result"):
        everything(2)
    for other in ({"commit": "before"}, {"command": "python -m benchmarks a --samples 9"}, {"model": {"pylib": "another"}}):
        save(**other)
        with pytest.raises(ConfigError, match="no stage left a result"):
            everything(2)
        assert asked == ["a", "b"]
    save()
    with pytest.raises(SystemExit):
        everything(130)
    with pytest.raises(ConfigError, match="no stage left a result"):
        everything(2, fresh=True)


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signal that lets it keep what it has, then by force."""
    monkeypatch.setattr(stages, "ENDS_S", 0.5)
    log = tmp_path / "log"
    good = "trap 'echo kept; exit 3' TERM; echo began; while :; do sleep 0.1; done"
    assert stages._run(["sh", "-c", good], log, 2.0) == 3 and log.read_text() == "began\nkept\n"
    assert (
        stages._run(["sh", "-c", "trap '' TERM; echo began; while :; do sleep 0.1; done"], log, 2.0) == -9 and log.read_text() == "began\n"
    )
