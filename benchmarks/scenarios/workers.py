"""One service in several processes: tokens a second of clients that ask at once, and what a worker has of its own in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.callers import Answer, Caller, clear_prompts
from benchmarks.deployment import Deployment
from benchmarks.measure import Run
from benchmarks.scenarios.serving import MB, PROMPT, crowd, wrong
from benchmarks.schema import Goal, median
from protocols.errors import ConfigError

FASTER, OWN_MB = 1.3, 150.0
"""What several workers' rate is to be, as a multiple of one's; and bytes that each has of its own, at most."""


def workers(run: Run, model: Path, work: Path, *, count: int, clients: int, tokens: int, samples: int) -> None:
    """Two deployments stand side by side, with one worker each party and with `count`, and are asked in turn, `samples` times.

    Each client is a process; a reply is a session of its own, and one that is not float's is counted. Before the first round each client
    has had its set-up of both.
    """
    network = run.network(model, work)
    prompts = clear_prompts(network, clients, PROMPT, tokens)
    rates: dict[int, list[float]] = {1: [], count: []}
    differ = 0
    with ExitStack() as stack:
        parties = {each: stack.enter_context(Deployment(network.directory, work / f"{each}-workers", workers=each)) for each in rates}
        callers = {
            each: [stack.enter_context(Caller(place.places, work / f"client-{each}-{n}", place.timeout)) for n in range(clients)]
            for each, place in parties.items()
        }

        def asked(several: Sequence[Caller], most: int) -> list[Answer]:
            for caller, prompt in zip(several, prompts, strict=True):
                caller.ask(prompt.ids, most)
            return [caller.take() for caller in several]

        for found in callers.values():
            asked(found, 2)
        for _ in range(samples):
            for each, found in callers.items():
                answers = asked(found, tokens)
                differ += wrong(answers, prompts)
                rates[each].append(crowd(answers).rate)
        parties[count].quiet(10.0)
        own = {role: [own_bytes(pid) for pid in workers_of(verb.pid)] for role, verb in parties[count].verbs.items()}
    for each, seen in rates.items():
        name = f"{each} worker{'s' if each > 1 else ''}"
        run.measure("tokens a second, all clients", median(seen) or 0.0, "1/s", network, PROMPT, of=name, samples=tuple(seen))
    for role, sizes in own.items():
        run.measure(
            "memory of a worker alone, the largest", float(max(sizes)), "B", network, PROMPT, of=role, samples=tuple(map(float, sizes))
        )
    run.note(
        f"workers: {clients} clients at once, replies of {tokens} tokens to prompts of {PROMPT}, a session each; what a worker has of its "
        "own are the pages that no other process has, after the last reply"
    )
    run.require(f"of {2 * samples * clients} replies, not float's", "", 0, differ)
    ratio = (median(rates[count]) or 0.0) / (median(rates[1]) or 1.0)
    run.budget += [
        Goal(f"{count} workers: one worker's tokens a second over theirs", "x", "", 1 / FASTER, 0.5, 1 / ratio),
        Goal(f"{count} workers: memory that one has of its own", "MB", "", OWN_MB, 100.0, max(max(sizes) for sizes in own.values()) / MB),
    ]


def workers_of(pid: int) -> list[int]:
    """The processes that serve, of a service that was started with several: children of its one child. ConfigError where there are none."""
    found = [worker for nursery in children(pid) for worker in children(nursery)]
    if not found:
        raise ConfigError("a service of several workers has none", remedy="its log says why")
    return found


def children(pid: int) -> list[int]:
    """Processes that this one started, and that run."""
    found = []
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(number))
    return found


def own_bytes(pid: int) -> int:
    """Bytes of a process that no other one shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))
