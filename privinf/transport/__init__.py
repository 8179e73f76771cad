"""Authenticated connections between the three parties: mutual TLS 1.3, frames, a byte and round meter, an emulated link."""

from privinf.transport.connection import Connection
from privinf.transport.door import TurnedAway
from privinf.transport.endpoint import Endpoint
from privinf.transport.frames import CONTROL, DATA, MAX_FRAME, Buffer, FrameKind
from privinf.transport.keys import Credentials, init_keys, load_credentials, renew_keys, show_keys
from privinf.transport.listener import Listener, dial, format_address, parse_address
from privinf.transport.memory import MemoryConnection, memory_pair
from privinf.transport.meter import Meter
from privinf.transport.shaper import Link, parse_link

__all__ = [
    "CONTROL",
    "DATA",
    "MAX_FRAME",
    "Buffer",
    "Connection",
    "Credentials",
    "Endpoint",
    "FrameKind",
    "Link",
    "Listener",
    "MemoryConnection",
    "Meter",
    "TurnedAway",
    "dial",
    "format_address",
    "init_keys",
    "load_credentials",
    "memory_pair",
    "parse_address",
    "parse_link",
    "renew_keys",
    "show_keys",
]
