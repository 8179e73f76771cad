"""Queries prepared by more and more workers of a cluster: their rate, what each party's processor does for one, and what bounds it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.deployment import Deployment
from benchmarks.measure import Run
from benchmarks.networks import Network
from benchmarks.scenarios.jobs import one_machine
from privinf.jobs.preparing import prepare
from privinf.lowering.explain import explain
from privinf.session.options import Options

BEYOND = (4, 8, 16, 32)
TICKS = os.sysconf("SC_CLK_TCK")
WORKER = b"ray::Preparer"
"""What Ray calls the process of one."""


def processor_s(pids: Sequence[int]) -> float:
    """Seconds of processor of these processes so far; those that are gone count nothing."""
    found = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        found += (int(fields[11]) + int(fields[12])) / TICKS
    return found


def workers() -> list[int]:
    """The processes of a cluster's workers on this machine."""
    found = []
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if Path(f"/proc/{number}/cmdline").read_bytes().startswith(WORKER):
                found.append(int(number))
    return found


def bound(count: int, alone_s: float, server_s: float, dealer_s: float, dealers: int = 1) -> float:
    """Queries a second by so many workers on a machine each: a query alone takes `alone_s`; a server and each dealer have one core."""
    return min(count / alone_s, 1 / server_s, dealers / dealer_s)


def farm(run: Run, work: Path, *, model: Path, counts: Sequence[int], each: int, seq: int, tokens: int) -> None:
    """`each` queries for each count of workers and each worker, all parties on this machine; then the bound beyond, with a machine each.

    Rates are of the queries after the first of each worker, which start it.
    """
    network = run.network(model, work)
    with Deployment(network.directory, work / "parties") as parties, one_machine(max(counts)) as cluster:
        server, dealer, keys = parties.places
        serving = {role: [parties.verbs[role].pid] for role in ("server", "dealer")}
        spent: dict[str, float] = {}
        alone_s = 0.0
        for count in counts:
            times: list[tuple[float, dict[str, float]]] = []

            def told(phase: str, share: float, times: list[tuple[float, dict[str, float]]] = times) -> None:
                if phase == "prepare":
                    pids = {**serving, "worker": workers()}
                    times.append((time.monotonic(), {role: processor_s(of) for role, of in pids.items()}))

            options = Options(cache=work / f"client-{count}")
            given = {"dealer": dealer, "keys": keys, "seq": [seq], "max_new_tokens": tokens, "options": options, "progress": told}
            prepare(server, count=(1 + each) * count, sessions=count, ray_address=cluster.address, **given)  # type: ignore[arg-type]
            (began, before), (ended, after) = times[-1 - each * count], times[-1]
            rate = each * count / (ended - began)
            run.measure(
                "prepared queries a second", rate, "1/s", network, seq, of=f"{count} worker{'s' if count > 1 else ''}, this machine"
            )
            spent = {role: (after[role] - before[role]) / (each * count) for role in after}
            for role, seconds in spent.items():
                run.measure("processor seconds of a prepared query", seconds, "s", network, seq, of=f"{role}, {count} at once")
            alone_s = alone_s or sum(spent.values())
    _beyond(run, network, seq, tokens, alone_s, spent)


def _beyond(run: Run, network: Network, seq: int, tokens: int, alone_s: float, spent: dict[str, float]) -> None:
    """With a machine for each worker; one query alone takes at most what all three do for it, one after the other."""
    for dealers in (1, 4):
        for count in BEYOND:
            rate = bound(count, alone_s, spent["server"], spent["dealer"], dealers)
            where = f"{count} workers on a machine each, a dealer of {dealers}" if dealers > 1 else f"{count} workers on a machine each"
            run.measure("prepared queries a second, by the seconds above", rate, "1/s", network, seq, of=where)
    cost = explain(network.lowered, seq, new_tokens=tokens)["total"]
    for of, size in (("from the dealer", cost["dealer_bytes"]), ("to the server", cost["peer_offline_bytes"])):
        run.measure("bytes of a prepared query", size, "B", network, seq, of=of)
    run.note(f"queries of {seq} prompt tokens and {tokens} new ones; this machine has {os.cpu_count()} cores, and all parties on them")
