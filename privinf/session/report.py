"""What a party has counted, in the contract's JSON."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from privinf.transport.meter import Cell

if TYPE_CHECKING:
    from privinf.lowering.lowered import Lowered
    from privinf.transport.connection import Connection


def counters(cell: Cell) -> dict[str, int]:
    """{`sent`, `received`, `payload`, `rounds`}."""
    values = cell.as_dict()
    return {name: values[name] for name in ("sent", "received", "payload", "rounds")}


def traffic_of(peer: Mapping[str, Cell], dealer: Cell) -> dict[str, Any]:
    """The contract's `traffic` of one party: set-up and online are the link between server and client, offline both links.

    Where there is no dealer, its part is zero, and the peer's all of it.
    """
    both = Cell()
    for part in (dealer, peer["offline"]):
        both.add(part)
    offline = {**counters(both), "dealer": counters(dealer), "peer": counters(peer["offline"])}
    return {"setup": counters(peer["setup"]), "offline": offline, "online": counters(peer["online"])}


def snapshot(peer: str, connection: Connection) -> dict[str, Any]:
    """A connection's counters by phase and label, and what its socket itself has taken and given, for measurements."""
    return {"peer": peer, "socket": {"sent": connection.raw_sent, "received": connection.raw_received}, **connection.meter.snapshot()}


def model_of(lowered: Lowered) -> dict[str, Any]:
    """{`variant`, `layers`, `heads`, `width`, `vocab`, `id`, `tokenizer`}; the last is its digest, or None."""
    sizes = {name: getattr(lowered.info, name) for name in ("variant", "layers", "heads", "width", "vocab")}
    return {**sizes, "id": lowered.id, "tokenizer": lowered.tokenizer_id}


def peak_rss_bytes() -> int:
    """Of this process, so far. On Linux not from `getrusage`, whose peak is inherited from the process that started this one."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
