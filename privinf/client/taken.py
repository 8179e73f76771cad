"""How many rows of a model's tables this client has taken under one key of the server's: what hides them is good for so many.

    CACHE/setup/MODEL/KEY/rows.taken    a number, durable before the rows that it counts are asked for

A few are counted ahead, and those that a session does not take are lost. A client that removes its cache counts anew.
"""

from __future__ import annotations

import threading
from pathlib import Path

from privinf.files import locked, refusals, write_private
from protocols import security
from protocols.errors import Code, ConfigError, RefusedError

AHEAD = 32


class Taken:
    """Of one session; several sessions of a cache count together."""

    def __init__(self, path: Path, wait_s: float) -> None:
        self._path, self._wait_s, self._left, self._guard = path, wait_s, 0, threading.Lock()

    def spend(self, count: int) -> None:
        """Counts so many; RefusedError where that would be too many, ConfigError where they cannot be counted."""
        with self._guard:
            if count > self._left:
                self._left += self._reserve(count - self._left)
            self._left -= count

    def _reserve(self, count: int) -> int:
        with locked(self._path.with_suffix(".lock"), self._wait_s), refusals(self._path):
            taken = self._read()
            room = security.TAKEN - taken
            if count > room:
                told = f"{taken} rows of the model's table under one key, and with {count} more they could be told apart"
                what = f"this client has taken {told}"
                remedy = "ask whoever runs the server to lower the model anew: it has another key then"
                raise RefusedError(what, party="client", remedy=remedy, code=Code.REFUSED)
            more = min(max(count, AHEAD), room)
            write_private(self._path, str(taken + more).encode())
            return more

    def _read(self) -> int:
        try:
            return int(self._path.read_bytes()[:32])
        except FileNotFoundError:
            return 0
        except ValueError:
            raise ConfigError(f"{self._path} is damaged", remedy="remove the directory that it is in, and ask again") from None
