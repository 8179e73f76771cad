"""The contract's JSON of a query, from a client's session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from privinf.session.report import TRUST, TRUST_TEXT, model_of, traffic_of
from privinf.transport.meter import PHASES, Cell

if TYPE_CHECKING:
    from privinf.client.session import ClientSession


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
