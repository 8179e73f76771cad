"""A log that crowds cannot fill: of each kind of line so many in a minute, and then how many more there were."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

WINDOW_S = 60.0
_KINDS = 64
"""Kinds within one minute; what comes beyond them counts as one more."""


@dataclass
class _Window:
    ends: float
    said: int = 0
    held: int = 0
    last: str = ""


class Sparing:
    """Lines for a logger, of warnings or what `level` says. Safe in threads; nothing is written while its lock is held."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def say(self, kind: str, line: str, most: int = 1, level: int = logging.WARNING, *, fault: BaseException | None = None) -> None:
        """Writes the line, with the place of a fault, unless there were `most` of this kind within the minute: then it is counted."""
        self.due()
        with self._lock:
            name = kind if kind in self._windows or len(self._windows) < _KINDS else ""
            window = self._windows.setdefault(name, _Window(time.monotonic() + WINDOW_S))
            fits = window.said < most
            if fits:
                window.said += 1
            else:
                window.held, window.last = window.held + 1, line
        if fits:
            self._log.log(level, "%s", line, exc_info=fault)

    def due(self, *, at_once: bool = False) -> float | None:
        """Says of the kinds whose minute is over (`at_once`: of all) how many were not written; seconds until that is due again."""
        now, over = time.monotonic(), []
        with self._lock:
            while self._windows and ((first := next(iter(self._windows.values()))).ends <= now or at_once):
                del self._windows[next(iter(self._windows))]
                over.append(first)
            rest = next((window.ends - now for window in self._windows.values()), None)
        for window in over:
            if window.held:
                self._log.warning("%d more in the last %g s like this one: %s", window.held, WINDOW_S, window.last)
        return rest
