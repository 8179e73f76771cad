"""What a run of the harness writes: one schema for all scenarios, versioned, read and written strictly.

`rows` are what was counted at a socket, one for each party, peer, phase, layer and operator. `totals` are sums of the rows and
nothing else; the counters of the `sockets` themselves are what `check` holds the rows against. `measures` are single figures of a
scenario: an error, a peak of memory, a ratio. What could not be measured stands in `absent`. `python -m benchmarks schema` prints
the JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from protocols.errors import ConfigError

VERSION = 2
Phase = Literal["setup", "offline", "online"]


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The link between the computing parties; null where loopback was used as it is."""

    rtt_ms: float | None = None
    mbit_s: float | None = None
    emulated: bool = False


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was run, on what: rows of one setting add up."""

    variant: str
    layers: int
    heads: int
    width: int
    seq: int
    backend: str
    device: str  # of all parties, or `client=cpu,server=cuda`
    link: Link
    alone: bool = False  # ours, by the two parties without a dealer

    @property
    def setting(self) -> Setting:
        """These fields alone."""
        return Setting(**{name: getattr(self, name) for name in Setting.__struct_fields__})


class Row(Setting, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One counter. `bytes_*` are of this party's socket towards `peer`; `seconds` is the median of `samples`, wall time at this party.

    Of `seconds`, this party computed `compute_seconds`, waited for the peer `wait_seconds`, and was in the transport (TLS, frames,
    the kernel) `wire_seconds`; medians too. null is what was not measured.
    """

    trust: str
    layer: str
    op: str
    phase: Phase
    party: str
    peer: str
    bytes_sent: int
    bytes_received: int
    payload: int | None = None  # of both, protocol elements: without TLS, frames and headers
    rounds: int
    seconds: float | None = None
    samples: tuple[float, ...] = ()
    compute_seconds: float | None = None
    wait_seconds: float | None = None
    wire_seconds: float | None = None
    peak_bytes: int | None = None  # resident memory of the party, the peak until the operator's end
    macs: int | None = None  # multiply-adds of the party on the critical path, by the walk on shapes


class Total(Setting, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One phase of one pass: `bytes_*` summed over all rows, so over parties; `rounds` and `seconds` are the client's."""

    phase: Phase
    bytes_sent: int
    bytes_received: int
    rounds: int
    seconds: float | None = None
    samples: tuple[float, ...] = ()


class Socket(Setting, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a party's socket itself took and gave during the pass of the rows, from the first byte of its handshake to the last."""

    party: str
    peer: str
    bytes_sent: int
    bytes_received: int


class Predicted(Setting, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `privinf explain` says of an operator, payload: how the dealer's stream and the set-up, one message each, split by operator."""

    layer: str
    op: str
    online_bytes: int
    rounds: int
    dealer_bytes: int
    peer_offline_bytes: int
    setup_bytes: int
    macs: int


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure: `name` says what, `of` whose; `samples` are raw."""

    name: str
    value: float
    unit: str
    of: str = ""
    variant: str = ""
    layers: int = 0
    width: int = 0
    seq: int = 0
    link: Link = Link()
    samples: tuple[float, ...] = ()


class Goal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the budget: published by others, what we must and want to reach, and what was measured; null where nothing was."""

    name: str
    unit: str
    published: str
    must: float
    goal: float
    measured: float | None
    why: str = "not measured"  # where nothing was


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
    took_s: float = 0.0
    model: dict[str, str] = {}  # the ids of the MODEL directories that were measured, by name; none where weights are random
    rows: tuple[Row, ...] = ()
    totals: tuple[Total, ...] = ()
    sockets: tuple[Socket, ...] = ()
    predicted: tuple[Predicted, ...] = ()
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


Seconds = Mapping[tuple[Setting, str], tuple[float, ...]]


def totals_of(rows: Iterable[Row], seconds: Seconds) -> list[Total]:
    """Sums of the rows; `seconds` gives the client's samples by setting and phase."""
    groups: dict[tuple[Setting, Phase], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.setting, row.phase), []).append(row)
    return [
        Total(
            **msgspec.structs.asdict(setting),
            phase=phase,
            bytes_sent=sum(r.bytes_sent for r in own),
            bytes_received=sum(r.bytes_received for r in own),
            rounds=sum(r.rounds for r in own if r.party == "client"),
            seconds=median(seconds.get((setting, phase), ())),
            samples=seconds.get((setting, phase), ()),
        )
        for (setting, phase), own in groups.items()
    ]


def check(result: Result) -> Result:
    """The sums, byte for byte; ConfigError where a total or a socket's counter is not the sum of its rows."""
    again = {(t.setting, t.phase): (t.bytes_sent, t.bytes_received, t.rounds) for t in totals_of(result.rows, {})}
    for total in result.totals:
        if again.get((total.setting, total.phase)) != (total.bytes_sent, total.bytes_received, total.rounds):
            raise ConfigError(f"the total of {total.backend}, {total.variant}, {total.phase} is not the sum of its rows")
    sums: dict[tuple[Setting, str, str], list[int]] = {}
    for row in result.rows:
        cell = sums.setdefault((row.setting, row.party, row.peer), [0, 0])
        cell[0] += row.bytes_sent
        cell[1] += row.bytes_received
    for socket in result.sockets:
        if sums.get((socket.setting, socket.party, socket.peer)) != [socket.bytes_sent, socket.bytes_received]:
            raise ConfigError(f"the socket of {socket.backend}'s {socket.party} has not counted the sum of its rows, {socket.variant}")
    return result


def encode(result: Result) -> bytes:
    """JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(check(result)), indent=1) + b"\n"


def read(path: Path) -> Result:
    """A result from a file, its sums checked; ConfigError in one line where it is none, or of another version."""
    return check(of_file(path, {"privinf-benchmarks": Result}))


def of_file(path: Path, kinds: Mapping[str, type]) -> Any:
    """What a file of one of these schemas holds."""
    try:
        data = path.read_bytes()
        head = msgspec.json.decode(data)
        if not isinstance(head, dict) or head.get("schema") not in kinds:
            raise ConfigError(f"{path} is no result of this harness")
        if head.get("version") != VERSION:
            raise ConfigError(f"{path} has schema version {head.get('version')}, this harness reads {VERSION}", remedy="run it again")
        return msgspec.json.decode(data, type=kinds[head["schema"]])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no valid result: {error}") from None
