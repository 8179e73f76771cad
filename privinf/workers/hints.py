"""Which worker has the session of a hint (`transport.hint`): what sessions' own workers say of them, and what connections alone say.

A hint is read before its peer has shown a certificate, so that anybody can make them up. A worker names one once the server of its
session has registered it, which takes a certificate; until then, which is for the time of a handshake, it is among those of strangers.
These can push out one another and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

W = TypeVar("W")
MOST = 1 << 16
"""Of either kind; the oldest goes."""


class Hints(Generic[W]):
    """Not safe in threads; the front has one."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._sessions: OrderedDict[str, W] = OrderedDict()
        self._strangers: OrderedDict[str, W] = OrderedDict()

    def __getitem__(self, hint: str) -> W | None:
        """Its worker, if there is one."""
        return self._sessions.get(hint) or self._strangers.get(hint)

    def seen(self, hint: str, worker: W) -> None:
        """A connection with this hint was handed to this worker; what is known of a session stays."""
        if hint not in self._sessions:
            self._keep(self._strangers, hint, worker)

    def known(self, hint: str, worker: W) -> None:
        """This worker has a session of this hint."""
        self._strangers.pop(hint, None)
        self._keep(self._sessions, hint, worker)

    def forget(self, worker: W) -> None:
        """It has gone, and its sessions with it."""
        for group in (self._sessions, self._strangers):
            for hint in [hint for hint, has in group.items() if has is worker]:
                del group[hint]

    def _keep(self, group: OrderedDict[str, W], hint: str, worker: W) -> None:
        group[hint] = worker
        if len(group) > self._most:
            group.popitem(last=False)
