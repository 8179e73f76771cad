"""A scenario from its start to its files."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Run
from benchmarks.output import as_csv, markdown
from benchmarks.schema import encode
from protocols.errors import ConfigError, PrivinfError


def perform(scenario: str, files: tuple[Path | None, Path | None, Path | None], measure: Callable[[Any, Path], None]) -> None:
    """Runs a scenario and writes what it measured, also where it was interrupted or failed."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"there is no directory {file.parent}")
    run, complete = Run(scenario), False
    try:
        with tempfile.TemporaryDirectory(prefix="privinf-bench-") as work:
            measure(run, Path(work))
        complete = True
    finally:
        if complete or run.rows or run.measures:
            result = run.result(complete)
            for file, make in zip(files, (encode, as_csv, markdown), strict=True):
                if file is not None:
                    text: Any = make(result)
                    file.write_bytes(text if isinstance(text, bytes) else text.encode())
            if not any(files):
                sys.stdout.write(markdown(result))
            if not complete:
                print("unfinished: what had been measured was kept and is marked so", file=sys.stderr)
    if run.broken:
        raise PrivinfError(f"{scenario}: {'; '.join(run.broken)}", remedy="the result has the rest")
