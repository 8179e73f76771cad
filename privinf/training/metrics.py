"""The metrics of a run, a line of JSON each, in its directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from privinf.models.checkpoint import write_atomically
from protocols.errors import ConfigError

METRICS = "metrics.jsonl"


class Metrics:
    """Of one directory; `listeners` are told what is recorded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def record(self, values: dict[str, Any]) -> None:
        """Appends a line; ConfigError where it cannot be written."""
        with writing(self.directory / METRICS):
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        for listener in self.listeners:
            listener(values)

    def forget_after(self, step: int) -> None:
        """Takes out what will now be done again."""
        path = self.directory / METRICS
        if path.is_file():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says which file could not be written; files are replaced whole, so that the one before is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be written: {reason}", remedy="what was saved before is kept; make room, then resume") from None
