"""Every protocol by itself: bytes an element, rounds, throughput, error."""

from __future__ import annotations

from benchmarks.measure import Run
from benchmarks.micro import cases, run_case
from benchmarks.schema import median


def micro(run: Run, *, samples: int) -> None:
    """Bytes are payload, both directions, over the in-memory twin; the dealer, the client and the server share one process."""
    run.note("payload over the in-memory twin; dealer, client and server share a process: seconds compare with other commits alone")
    for case in cases():
        found = run_case(case, samples + 1)
        seconds = tuple(found.seconds[1:])
        for name, value, unit in (
            ("online", found.online_bytes, "B/element"),
            ("from the dealer", found.dealer_bytes, "B/element"),
            ("offline between S and C", found.offline_bytes, "B/element"),
            ("rounds", found.rounds, ""),
        ):
            run.measure(name, value, unit, of=case.name)
        if found.error is not None:
            run.measure("error", found.error, "", of=case.name)
        middle = median(seconds)
        if middle:
            run.measure("throughput", case.elements / middle, "elements/s", of=case.name, samples=tuple(case.elements / s for s in seconds))
