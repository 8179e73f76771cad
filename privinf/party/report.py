"""The contract's JSON of a run, from a client's session."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from privinf.transport.meter import PHASES, Cell

if TYPE_CHECKING:
    from privinf.lowering.lowered import Lowered
    from privinf.party.session import ClientSession
    from privinf.transport.connection import Connection

TRUST = "dealer"
TRUST_TEXT = "semi-honest server and client; the dealer is a third party trusted only not to collude"


def counters(cell: Cell) -> dict[str, int]:
    """{`sent`, `received`, `payload`, `rounds`}."""
    values = cell.as_dict()
    return {name: values[name] for name in ("sent", "received", "payload", "rounds")}


def traffic_of(peer: Mapping[str, Cell], dealer: Cell) -> dict[str, Any]:
    """The contract's `traffic` of one party: set-up and online are the link between server and client, offline both links."""
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


def result_of(session: ClientSession) -> dict[str, Any]:
    """What `run` and `generate` print with --json."""
    timing, sessions = session.timing, [*session.earlier, session]
    plan = session.lowered.plan.values()
    peer, dealer = {phase: Cell() for phase in PHASES}, Cell()
    for connection in (connection for each in sessions for connection in each.connections):
        for phase in PHASES:
            (dealer if connection.peer_role == "dealer" else peer[phase]).add(connection.meter.total(phase))
    return {
        "text": session.streamer.finish() if session.streamer else None,
        "prompt_tokens": len(session.prompt.ids) if session.prompt else 0,
        "padded": {"prompt_tokens": session.shown[0], "tokens": session.shown[1], "seconds": timing.padding_s},
        "tokens": list(session.tokens),
        "finish_reason": session.finish_reason,
        "timing": {
            "setup_s": timing.setup_s,
            "offline_s": timing.offline_s,
            "first_token_s": timing.tokens_s[0] if timing.tokens_s else 0.0,
            "per_token_s": list(timing.tokens_s),
        },
        "traffic": traffic_of(peer, dealer),
        "retries": len(session.earlier),
        "prepared": session.prepared is not None,
        "trust": TRUST,
        "trust_model": TRUST_TEXT,
        "ring_bits": max(entry.bits for entry in plan),
        "fractional_bits": max(entry.frac for entry in plan),
        "model": model_of(session.lowered),
        **({"logits": [x.reshape(-1).tolist() for x in session.logits]} if session.logits else {}),
    }


def peak_rss_bytes() -> int:
    """Of this process, so far. On Linux not from `getrusage`, whose peak is inherited from the process that started this one."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
