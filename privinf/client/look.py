"""A look at the server that begins no session: whether it answers, as whom it is expected, and with which model."""

from __future__ import annotations

import contextlib

from privinf.client.lines import Peers
from privinf.session.messages import Needs, Welcome, greet
from privinf.transport.listener import dial
from protocols.errors import PrivinfError

LOOK_S = 3.0
"""How long it may take."""


def missing(peers: Peers, model: str) -> str:
    """Why no session with this model could begin now; empty where one could, also where the server is full for the moment."""
    try:
        with contextlib.closing(dial(peers.server, peers.credentials, "server", LOOK_S, connect_s=0.5)) as connection:
            greet(connection)
            found = connection.receive_control(Welcome).model
            connection.send_control(Needs((), looks=True))
    except PrivinfError as error:
        return "" if error.retry_after is not None else f"the server at {peers.server} cannot be reached: {error.message}"
    return "" if found == model else f"the server at {peers.server} has another model than it had"
