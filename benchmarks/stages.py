"""Everything in one go: scenarios as processes of their own, one result file each, then the report of what there is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from protocols.errors import ConfigError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stage:
    """A scenario's words, and how long it takes on two idle cores."""

    name: str
    words: tuple[str, ...]
    minutes: float
    long: bool = False  # run only where it is asked for by its name


def stages(quick: bool, model: Path, device: str) -> list[Stage]:
    """`quick`: what `make bench` runs."""
    small, name = ("--quick",) if quick else (), str(model)
    links = "loopback,lan,20ms:200" if quick else "loopback,lan,20ms:200,wan,4g"
    on = () if device == "cpu" else ("--device", device)
    found = [
        Stage("micro", ("micro",), 0.3),
        Stage("shipped", ("shipped", name, "--samples", "2" if quick else "5"), 1.0 if quick else 1.5),
        Stage("links", ("links", name, "--links", links, "--kernel", "--samples", "1" if quick else "3", *on), 0.5 if quick else 3),
        Stage("generate", ("generate", name, *small), 1.5 if quick else 8),
        Stage("pareto", ("pareto",), 0.5),
        Stage("scale", ("scale", *small, "--samples", "1" if quick else "3", *on), 1.0 if quick else 3),
        Stage("ladder", ("ladder", *small, "--samples", "1" if quick else "2", *on), 1.0 if quick else 15),
    ]
    if not quick:
        versus = ("ladder", "--networks", "SM+ScFuFFN_i6,SM+LN+G", "--backends", "privinf,crypten,plain", "--samples", "2")
        found += [Stage("versus", versus, 15), Stage("budget", ("budget",), 3)]
        found += [Stage("passes", ("passes", name), 12, long=True), Stage("soak", ("soak", name), 32, long=True)]
    return found


def everything(chosen: list[Stage], out: Path, *, fresh: bool, named: Collection[str] = ()) -> list[Path]:
    """Runs what has no complete result in `out` yet (all, if `fresh`); the result files. A stage that fails is said and left out.

    A long stage runs only if it is named; a result of it that is there is used.
    """
    from benchmarks.schema import read

    out.mkdir(parents=True, exist_ok=True)
    began, files = time.monotonic(), []
    chosen = [stage for stage in chosen if not stage.long or stage.name in named or (out / f"{stage.name}.json").is_file()]
    for number, stage in enumerate(chosen):
        path, kept = out / f"{stage.name}.json", stage.long and stage.name not in named
        if fresh and not kept:
            path.unlink(missing_ok=True)
        try:
            done = path.is_file() and read(path).complete
        except ConfigError:
            done = False
        words = [sys.executable, "-m", "benchmarks", *stage.words, "--json", str(path)]
        left = sum(stage.minutes for stage in chosen[number:])
        state = "kept" if done or kept else f"about {stage.minutes:g} min, {left:g} min to go"
        print(f"[{time.monotonic() - began:5.0f} s] {stage.name}: {state}", file=sys.stderr, flush=True)
        if not (done or kept):
            path.unlink(missing_ok=True)
            code = _run(words)
            if code == 130:
                raise SystemExit(130)  # it has said so
            if code:
                print(f"{stage.name} ended with {code}; the others go on", file=sys.stderr, flush=True)
        if path.is_file():
            files.append(path)
    if not files:
        raise ConfigError("no stage left a result", remedy="look at the lines above")
    return files


def _run(words: list[str]) -> int:
    """Ctrl-C reaches the child through us, once: it keeps what it has and ends by itself."""
    child = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
