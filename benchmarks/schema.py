"""What a run of the harness writes: one schema for all scenarios, versioned, read and written strictly.

`rows` are what was counted at a socket, one for each party, peer, phase, layer and operator. `totals` are sums of the rows and nothing
else. `measures` are single figures of a scenario: an error, a peak of memory, a ratio. What could not be measured stands in `absent`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from protocols.errors import ConfigError

VERSION = 1
Phase = Literal["setup", "offline", "online"]


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The link between the computing parties; null where loopback was used as it is."""

    rtt_ms: float | None = None
    mbit_s: float | None = None
    emulated: bool = False


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One counter. `bytes_*` are of this party's socket towards `peer`; `seconds` is the median of `samples`, wall time at this party."""

    variant: str
    layers: int
    heads: int
    width: int
    seq: int
    backend: str
    trust: str
    device: str
    link: Link
    layer: str
    op: str
    phase: Phase
    party: str
    peer: str
    bytes_sent: int
    bytes_received: int
    rounds: int
    seconds: float | None = None
    samples: tuple[float, ...] = ()
    cpu_seconds: float | None = None  # of `seconds`, what this party's thread computed


class Total(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One phase of one pass: `bytes_*` summed over all rows, so over parties; `rounds` and `seconds` are the client's."""

    variant: str
    seq: int
    device: str
    backend: str
    link: Link
    phase: Phase
    bytes_sent: int
    bytes_received: int
    rounds: int
    seconds: float | None = None
    samples: tuple[float, ...] = ()


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure: `name` says what, `of` whose; `samples` are raw."""

    name: str
    value: float
    unit: str
    of: str = ""
    variant: str = ""
    seq: int = 0
    samples: tuple[float, ...] = ()
    note: str = ""


class Goal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the budget: published by others, what we must and want to reach, and what was measured; null where nothing was."""

    name: str
    unit: str
    published: str
    must: float
    goal: float
    measured: float | None


class Absent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is not in the result, and why."""

    what: str
    reason: str


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run of one scenario."""

    scenario: str
    command: str
    commit: str
    started: str
    machine: dict[str, Any]
    versions: dict[str, str]
    complete: bool = False
    rows: tuple[Row, ...] = ()
    totals: tuple[Total, ...] = ()
    measures: tuple[Measure, ...] = ()
    budget: tuple[Goal, ...] = ()
    absent: tuple[Absent, ...] = ()
    notes: tuple[str, ...] = ()
    schema: Literal["privinf-benchmarks"] = "privinf-benchmarks"
    version: int = VERSION


def median(samples: Iterable[float]) -> float | None:
    """The middle one, the mean of the middle two, None of none."""
    ordered = sorted(samples)
    if not ordered:
        return None
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def totals_of(rows: Iterable[Row], seconds: dict[tuple[str, str, int, str], tuple[float, ...]]) -> list[Total]:
    """Sums of the rows; `seconds` gives the client's samples by (backend, variant, seq, phase)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.seq, row.device, row.backend, row.link, row.phase), []).append(row)
    found = []
    for (variant, seq, device, backend, link, phase), members in groups.items():
        samples = seconds.get((backend, variant, seq, phase), ())
        sent, received = sum(r.bytes_sent for r in members), sum(r.bytes_received for r in members)
        rounds = sum(r.rounds for r in members if r.party == "client")
        found.append(Total(variant, seq, device, backend, link, phase, sent, received, rounds, median(samples), samples))
    return found


def check(result: Result) -> Result:
    """The sums; ConfigError where a total is not the sum of its rows."""
    again = {(t.variant, t.seq, t.device, t.backend, t.link, t.phase): t for t in totals_of(result.rows, {})}
    for total in result.totals:
        own = again.get((total.variant, total.seq, total.device, total.backend, total.link, total.phase))
        counted = own and (own.bytes_sent, own.bytes_received, own.rounds)
        if counted != (total.bytes_sent, total.bytes_received, total.rounds):
            raise ConfigError(f"the total of {total.backend}, {total.variant}, {total.phase} is not the sum of its rows")
    return result


def encode(result: Result) -> bytes:
    """JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(check(result)), indent=1) + b"\n"


def read(path: Path) -> Result:
    """A result from a file; ConfigError in one line where it is none, or of another version."""
    try:
        data = path.read_bytes()
        head = msgspec.json.decode(data)
        if not isinstance(head, dict) or head.get("schema") != "privinf-benchmarks":
            raise ConfigError(f"{path} is no result of this harness")
        if head.get("version") != VERSION:
            raise ConfigError(f"{path} has schema version {head.get('version')}, this harness reads {VERSION}", remedy="run it again")
        return check(msgspec.json.decode(data, type=Result))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no valid result: {error}") from None
