"""A look at server and dealer that begins no session: whether they answer, as whom they are expected, and the server with which model."""

from __future__ import annotations

import contextlib

from privinf.client.lines import Peers
from privinf.session.messages import End, Needs, Welcome, greet
from privinf.transport.listener import dial
from privinf.trust import DEALER
from protocols.errors import PrivinfError

LOOK_S = 3.0
"""How long it may take."""


def missing(peers: Peers, model: str) -> str:
    """Why no session with this model could begin now; empty where one could, also where a peer is full for the moment."""
    try:
        with contextlib.closing(dial(peers.server, peers.credentials, "server", LOOK_S, connect_s=0.5)) as connection:
            greet(connection)
            found = connection.receive_control(Welcome)
            connection.send_control(Needs((), looks=True))
    except PrivinfError as error:
        return _away("server", peers.server, error)
    if found.model != model:
        return f"the server at {peers.server} has another model than it had"
    return _dealer(peers, peers.dealer) if found.trust == DEALER and peers.dealer is not None else ""


def _dealer(peers: Peers, address: str) -> str:
    try:
        with contextlib.closing(dial(address, peers.credentials, "dealer", LOOK_S, connect_s=0.5)) as connection:
            greet(connection)
            connection.send_control(End())
    except PrivinfError as error:
        return _away("dealer", address, error)
    return ""


def _away(role: str, address: str, error: PrivinfError) -> str:
    return "" if error.retry_after is not None else f"the {role} at {address} cannot be reached: {error.message}"
