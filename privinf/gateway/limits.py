"""What the gateway bounds: replies and conversations, and what HTTP may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from privinf.setting import Setting


@dataclass(frozen=True)
class Limits:
    """The longest reply, replies at a time, callers that wait for one, conversations that are kept and for how long.

    With `prepared` a new conversation's first query uses one that was prepared ahead, if one fits, and is not kept. `retry` times at most
    a reply whose connection breaks goes on in a fresh session. With a `batch` a conversation that begins while others are answered shares
    a session, of so many at most, and replies that are made there at a time go through the same passes.
    """

    new_tokens: Annotated[int, Setting("The longest reply that callers get.", "N", least=1, name="max_new_tokens")] = 256
    active: Annotated[int, Setting("Replies at a time.", "N", least=1, most=64)] = 4
    batch: Annotated[int, Setting("Conversations in one session, replies of which share passes; 1: none do.", "N", least=1, most=64)] = 1
    waiting: Annotated[int, Setting("Callers that may wait; the next gets a 429.", "N", least=0)] = 16
    kept: Annotated[int, Setting("Idle conversations kept for a next turn.", "N", least=0, most=64)] = 4
    keep_s: Annotated[float, Setting("How long an idle conversation is kept, seconds.", "S", least=0.0, name="keep")] = 300.0
    prepared: Annotated[bool, Setting("Use queries of `privinf prepare` for first turns that fit.")] = True
    retry: Annotated[int, Setting("Where a connection breaks, go on in a fresh session, N times at most.", "N", least=0)] = 0


@dataclass(frozen=True)
class Bounds:
    """What HTTP may cost: seconds and connections.

    Of more than `connections` open ones a further one is told to come again later, and twice as many are never held. `wait_s` is the
    longest wait for the head of a request, for its body, and for a caller that does not take what it is sent; `idle_s` for a next
    request on an open connection. `drain_s` is how long replies that are on their way may take once a signal has come.
    """

    connections: Annotated[int, Setting("HTTP connections at a time.", "N", least=1)] = 256
    wait_s: Annotated[float, Setting("The longest wait for a caller, seconds.", "S", name="http_timeout")] = 30.0
    idle_s: float = 15.0
    drain_s: Annotated[float, Setting("How long replies may still take after a signal.", "S", least=0.0, name="drain")] = 5.0
