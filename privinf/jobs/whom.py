"""Whom a worker of a job asks, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass

from privinf.client.client import Client
from privinf.session.options import Options
from privinf.transport.listener import Waiting


@dataclass(frozen=True, repr=False, kw_only=True)
class Whom:
    """A server and its dealer, if it has one, as a client with these keys and options; `tries` where something breaks."""

    server: str
    dealer: str | None
    keys: str
    options: Options
    tries: int = 3

    def client(self, waiting: Waiting | None = None) -> Client:
        """Not connected yet; `waiting` as a client's."""
        return Client(self.server, dealer=self.dealer, keys=self.keys, options=self.options, waiting=waiting)
