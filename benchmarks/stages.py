"""Everything in one go: scenarios as processes of their own, one result and one log each, then the report of what there is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.networks import model_id
from benchmarks.published import BASELINE, SMALLEST
from benchmarks.schema import Result, read
from benchmarks.spread import spread
from protocols.errors import ConfigError

ROOT = Path(__file__).parents[1]
BESIDE = ("pylib-gpt2", "pylib-llama")
"""Shipped models that were trained as the one measured was."""
PATIENCE, LEAST_S = 6, 600.0
"""A stage may take so many times its minutes, and at least so long, before it is stopped; what it has measured by then is kept."""
ENDS_S = 60.0


@dataclass(frozen=True)
class Stage:
    """A scenario's words, and how long it takes on two idle cores."""

    name: str
    words: tuple[str, ...]
    minutes: float
    long: bool = False  # run only where it is asked for by its name


def stages(quick: bool, model: Path, device: str) -> list[Stage]:
    """`quick`: what `make bench` runs. No network is lowered by two of them at one size, and stock CrypTen runs each once."""
    small, name = ("--quick",) if quick else (), str(model)
    links = "loopback,lan,20ms:200" if quick else "loopback,lan,20ms:200,wan,4g"
    on = () if device == "cpu" else ("--device", device)
    trained = (name, *(f"models/{other}" for other in BESIDE if (ROOT / "models" / other).is_dir()))
    beside = ("--beside", ",".join(name.replace("_i6", "_i{half}") for name in (SMALLEST, BASELINE)))
    found = [
        Stage("shipped", ("shipped", name, "--samples", "2" if quick else "5", "--errors", "1" if quick else "3"), 1.5),
        Stage("ladder", ("ladder", *small, *beside, "--samples", "1" if quick else "2", *on), 1.5 if quick else 12),
        *(() if quick else [Stage("budget", ("budget",), 2.5)]),
        Stage("trust", ("trust", *small), 1.5 if quick else 12),
        *(() if quick else [Stage("two-party", ("budget", "--trust", "two-party", "--model", name), 12)]),
        Stage("generate", ("generate", name, *small), 1.5 if quick else 6),
        Stage("links", ("links", name, "--links", links, "--kernel", "--samples", "1" if quick else "2", *on), 0.5 if quick else 2),
        Stage("scale", ("scale", *small, "--samples", "1" if quick else "2", *on), 1.5),
        Stage("pareto", ("pareto", *trained), 2),
        Stage("passes", ("passes", name, "--count", "20" if quick else "200"), 0.5 if quick else 2),
        Stage("micro", ("micro",), 0.3),
    ]
    return found if quick else [*found, Stage("soak", ("soak", name), 32, long=True)]


def everything(
    chosen: Sequence[Stage], out: Path, *, fresh: bool, named: Collection[str] = (), engine: str = "here", address: str = "auto"
) -> tuple[list[Result], list[str]]:
    """Runs what `out` has no complete result of (all, if `fresh`) that the code and the words of now would give again.

    A stage that fails is said and does not stop the others. Where stages are `named`, they alone are run. The results of now, and the
    names of the stages that lack a complete one, but for long ones. With the engine `ray` each stage has a node of a cluster to itself.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, now = time.monotonic(), machine.commit()
    elsewhere: list[tuple[Stage, Path]] = []
    runs = [stage for stage in chosen if (stage.name in named if named else not stage.long)]
    for number, stage in enumerate(runs):
        path = out / f"{stage.name}.json"
        kept = not fresh and _kept(path, stage, now, complete=True) is not None
        left = sum(one.minutes for one in runs[number:])
        state = "kept" if kept else f"about {stage.minutes:g} min, {left:g} min to go"
        _say(f"[{time.monotonic() - began:5.0f} s] {stage.name}: {state}")
        if kept:
            continue
        path.unlink(missing_ok=True)
        if engine == "here":
            _tell(stage, path, measure(stage, path))
        else:
            elsewhere.append((stage, path))
    if elsewhere:
        for place, came in spread(measure_there, elsewhere, workers=len(elsewhere), engine=engine, address=address, alone=True):
            stage, path = elsewhere[place]
            _tell(stage, path, _brought(path, *came))
    found = {stage.name: result for stage in chosen if (result := _kept(out / f"{stage.name}.json", stage, now)) is not None}
    if not found:
        raise ConfigError("no stage left a result", remedy=f"look at the logs in {out}")
    lacking = [stage.name for stage in chosen if not stage.long and not (stage.name in found and found[stage.name].complete)]
    return list(found.values()), lacking


def _kept(path: Path, stage: Stage, commit: str, *, complete: bool = False) -> Result | None:
    """The result at `path`, if this commit, this stage's words and the models as they are now would give it again."""
    if not path.is_file():
        return None
    try:
        found = read(path)
        models = {model.resolve().name: model_id(model) for model in (ROOT / word for word in stage.words) if model.is_dir()}
    except ConfigError:
        return None
    as_now = found.commit == commit and found.command == machine.command([*stage.words, "--json", str(path)])
    same = as_now and all(models.get(name) == one for name, one in found.model.items())
    return found if same and (found.complete or not complete) else None


def measure(stage: Stage, path: Path) -> int:
    """One stage, with its result and its log; the exit code."""
    words = [sys.executable, "-m", "benchmarks", *stage.words, "--json", str(path)]
    return _run(words, path.with_suffix(".log"), max(LEAST_S, 60 * PATIENCE * stage.minutes))


def measure_there(stage: Stage, path: Path) -> tuple[int, bytes | None, bytes]:
    """The same on another machine: the code, the result if there is one, and the log."""
    here = ROOT / path
    here.parent.mkdir(parents=True, exist_ok=True)
    here.unlink(missing_ok=True)
    os.chdir(ROOT)
    code = measure(stage, path)
    return code, here.read_bytes() if here.is_file() else None, here.with_suffix(".log").read_bytes()


def _brought(path: Path, code: int, result: bytes | None, log: bytes) -> int:
    """What came from there is here."""
    path.with_suffix(".log").write_bytes(log)
    if result is not None:
        path.write_bytes(result)
    return code


def _tell(stage: Stage, path: Path, code: int) -> None:
    """Says what came of a stage that failed; SystemExit where it was interrupted."""
    log = path.with_suffix(".log")
    if code == 130:
        _say("interrupted")
        raise SystemExit(130)
    if code:
        last = log.read_text("utf-8", "replace").strip().splitlines()[-1:] if log.is_file() else []
        _say(f"{stage.name} ended with {code} ({' '.join(last) or 'without a word'}; {log} has the rest); the others go on")


def _run(words: list[str], log: Path, most_s: float) -> int:
    """Ctrl-C reaches the child through us, once: it keeps what it has and ends by itself; so does one that takes too long."""
    with log.open("wb") as file:
        child = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=file, stderr=subprocess.STDOUT)
    late = False
    while True:
        try:
            code = child.wait(ENDS_S if late else most_s)
            return 1 if late and code == 130 else code
        except KeyboardInterrupt:
            child.terminate()
        except subprocess.TimeoutExpired:
            if late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            else:
                child.terminate()
            late = True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
