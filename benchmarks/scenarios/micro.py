"""Every protocol by itself: bytes an element, rounds, throughput, error."""

from __future__ import annotations

from benchmarks.measure import Run
from benchmarks.micro import cases, run_case
from benchmarks.schema import median
from benchmarks.transfers import Speed, speeds
from privinf.trust import DEALER, TWO_PARTY

ELEMENTS = 50000  # of what stands on oblivious transfer


def micro(run: Run, *, samples: int, trust: str = DEALER) -> None:
    """Bytes are payload, both directions, over the in-memory twin; all parties share one process."""
    alone = trust == TWO_PARTY
    who = "client and server" if alone else "dealer, client and server"
    run.note(f"payload over the in-memory twin; {who} share a process: seconds compare with other commits alone")
    for case in cases():
        found = run_case(case, samples + 1, trust)
        seconds = tuple(found.seconds[1:])
        for name, value, unit in (
            ("online", found.online_bytes, "B/element"),
            ("from the dealer", None if alone else found.dealer_bytes, "B/element"),
            ("offline between S and C", found.offline_bytes, "B/element"),
            ("rounds", found.rounds, ""),
            ("offline rounds", found.offline_rounds if alone else None, ""),
            ("offline", median(found.offline_seconds[1:]) if alone else None, "s"),
        ):
            if value is None:
                continue
            run.measure(name, value, unit, of=case.name)
        if found.error is not None:
            run.measure("error", found.error, "", of=case.name)
        middle = median(seconds)
        if middle:
            run.measure("throughput", case.elements / middle, "elements/s", of=case.name, samples=tuple(case.elements / s for s in seconds))
    _transfers(run, samples)


def _transfers(run: Run, samples: int) -> None:
    """By each party's own processor; bytes are those of the first sample."""
    found: dict[str, list[Speed]] = {}
    for _ in range(samples + 1):
        for speed in speeds(ELEMENTS):
            found.setdefault(speed.name, []).append(speed)
    for name, each in found.items():
        of, last = f"oblivious transfer: {name}", each[0]
        run.measure("bytes", last.bytes / last.transfers, "B/transfer", of=of)
        for who, seconds in (("sender", [e.sender_s for e in each[1:]]), ("receiver", [e.receiver_s for e in each[1:]])):
            middle = median(seconds)
            if middle:
                run.measure(who, last.transfers / middle, "transfers/s", of=of, samples=tuple(last.transfers / s for s in seconds))
            if middle and last.elements:
                run.measure(f"{who}, each", middle / last.elements * 1e6, "us", of=of)
