"""A crowd of visitors, good and bad, for a stated time at a deployment of real processes; and whether it is afterwards what it was."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from benchmarks.callers import clear_prompts, clear_reply, fork_server
from benchmarks.deployment import Deployment, Footprint, alarms
from benchmarks.measure import Run
from benchmarks.networks import Network
from benchmarks.scenarios.serving import growth
from benchmarks.visitors import GOOD, KINDS, Errand, Known, Report, World, visit
from privinf.client.text import Streamer
from privinf.client.tokenizer import load_tokenizer
from privinf.transport.keys import init_keys
from protocols.errors import TransportError

PROMPTS, PROMPT, REPLY, TURN, SECOND = 6, 12, 6, 4, 3
TIMEOUT_S = 20.0
"""Of the parties: how long a silent or dawdling peer is waited for."""
HANGS_S = 90.0
"""A visitor that has not ended by then hangs, but for one that was to stop."""
STOPPED_S = 14.0
POOLS = {("gateway", "threads"): 16}
"""What a party may come to have in all: the gateway's two pools fill up as they are needed, to ten threads beside its own, and stay."""
QUIET_S = 40.0
FLAT_BYTES = 32e6
"""Memory is flat if a party holds at most so much more at the last third of the quiet moments than at the first: arenas fill slowly."""
SAMPLE_S = 5.0


@dataclass
class Tally:
    """What the visitors told, added up."""

    kinds: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    tokens: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    faults: int = 0  # HTTP answers that say of a fault of the gateway's own
    admitted: int = 0  # bad requests that were answered as good ones
    twice: int = 0  # seeds and first messages that had been seen before
    unproved: int = 0  # replies over the protocol that left no seed, or no message
    seen: set[bytes] = field(default_factory=set)

    def take(self, kind: str, report: Report | None, *, hung: bool = False) -> None:
        """One visitor's end; no report from one that died."""
        self.kinds[kind] += 1
        if hung:
            self.hung.append(kind)
        if report is None:
            if kind in GOOD and not hung:
                self.failed.append(f"{kind}: its process ended without a word")
            return
        if kind in GOOD and (report.error or not report.replies):
            self.failed.append(f"{kind}: {report.error or 'no reply'}")
        self.replies += len(report.replies)
        self.tokens += report.tokens
        self.wrong += sum(found != wanted for found, wanted in report.replies)
        self.faults += report.status == 500
        self.admitted += kind == "bad_http" and report.status == 200
        self.twice += sum(digest in self.seen for digest in report.once) + len(report.once) - len(set(report.once))
        self.seen.update(report.once)
        self.unproved += report.tokens > 0 and len(report.once) <= report.tokens


@dataclass
class Level:
    """A quiet moment: seconds since the start, and what the system says of each party."""

    at: float
    states: dict[str, Footprint]


def leaks(first: Mapping[str, Footprint], last: Mapping[str, Footprint]) -> list[str]:
    """Threads, files and sockets of which a party has more than at the start and than its pools hold."""
    found = []
    for role, state in first.items():
        for what in ("threads", "files", "sockets"):
            before, after = getattr(state, what), getattr(last[role], what)
            if after > max(before, POOLS.get((role, what), 0)):
                found.append(f"{role}: {after - before} {what} more than the {before} at the start")
    return found


def falls(values: Iterable[float]) -> int:
    """How often a counter has become less."""
    return sum(after < before for before, after in itertools.pairwise(values))


def soak(run: Run, work: Path, *, model: Path | None, minutes: float, at_a_time: int, seed: int) -> None:
    """A tenth of the time warms everything up; the rest is in parts, and after each the crowd leaves and the parties are looked at."""
    network = run.network(model, work)
    known = _known(network)
    init_keys(work / "strangers", ("localhost", "127.0.0.1"))
    (work / "visitors").mkdir()
    chosen, tally = random.Random(seed), Tally()
    parts, warm = max(2, min(9, round(minutes / 3))), max(8.0, 6.0 * minutes)
    began = time.monotonic()
    with Deployment(network.directory, work / "parties", gateway=True, timeout=TIMEOUT_S) as parties:
        world = World(
            server=parties.address("server"),
            dealer=parties.address("dealer"),
            gateway=parties.address("gateway"),
            keys=str(work / "parties" / "keys"),
            strangers=str(work / "strangers"),
            cache=str(work / "visitors"),
            vocabulary=network.lowered.info.vocab,
            known=known,
        )
        swarm = _Swarm(world, parties, tally, chosen, at_a_time)
        swarm.run(warm, list(KINDS))
        levels = [swarm.level(began)]
        for number in range(parts):
            swarm.run((60.0 * minutes - warm) / parts)
            levels.append(swarm.level(began))
            print(
                f"{tally.replies} replies, {sum(tally.kinds.values())} visitors, part {number + 1} of {parts}", file=sys.stderr, flush=True
            )
        spent = {role: parties.metrics(role)["privinf_correlations_total"] for role in ("server", "dealer")}
        logs = {role: verb.log for role, verb in parties.verbs.items()}
    _judge(run, network, swarm, levels, spent, {role: alarms(log) for role, log in logs.items()})
    run.note(f"soak: {minutes:g} minutes, {at_a_time} visitors at a time, seed {seed}; the first {warm:.0f} s warm up")
    for role, log in logs.items():
        run.measure("lines in the log", log.count("\n"), "", network, of=role)


def _known(network: Network) -> list[Known]:
    """Prompts whose two replies are clear in float."""
    tokenizer, found = load_tokenizer(network.lowered.tokenizer), list[Known]()
    for number in itertools.count():
        (one,) = clear_prompts(network, 1, PROMPT, REPLY, first=number)
        turn = network.ids(TURN, 1000 + number)
        second = clear_reply(network, one.ids + one.reply + turn, SECOND)
        if second is not None and one.ids not in [each.ids for each in found]:
            streamer = Streamer(tokenizer)
            for token in one.reply:
                streamer.add(token)
            text = " ".join(map(str, one.reply)) if tokenizer is None else streamer.finish() or ""
            found.append(Known(one.ids, one.reply, turn, second, text))
        if len(found) == PROMPTS:
            break
    return found


class _Swarm:
    """Starts visitors, so many at a time, and takes their reports."""

    def __init__(self, world: World, parties: Deployment, tally: Tally, chosen: random.Random, size: int) -> None:
        self._world, self._parties, self._tally, self._random, self._size = world, parties, tally, chosen, size
        self._numbers = itertools.count()
        self._sampled = 0.0
        self.memory: dict[str, list[float]] = {}
        self.spent: dict[str, list[float]] = {"server": [], "dealer": []}
        self.unsettled = 0

    def run(self, seconds: float, first: Sequence[str] = ()) -> None:
        """Visitors of chance kinds for so long, those of `first` before; returns once all have ended."""
        ends, planned, active = time.monotonic() + seconds, list(first), list[_Visit]()
        while active or time.monotonic() < ends or planned:
            while len(active) < self._size and (planned or time.monotonic() < ends):
                kind = planned.pop() if planned else self._random.choices(list(KINDS), list(KINDS.values()))[0]
                errand = Errand(kind, self._random.randrange(PROMPTS), self._random.uniform(0.05, 3.0), next(self._numbers))
                active.append(_Visit(self._world, errand))
            wait([each.sentinel for each in active], timeout=0.5)
            for each in list(active):
                if each.over():
                    active.remove(each)
                    self._tally.take(each.errand.kind, each.report, hung=each.hung)
            self._sample()

    def _sample(self) -> None:
        if time.monotonic() - self._sampled < SAMPLE_S:
            return
        self._sampled = time.monotonic()
        for role, state in self._parties.states().items():
            self.memory.setdefault(role, []).append(float(state.rss))
        for role, values in self.spent.items():
            values.append(self._parties.metrics(role)["privinf_correlations_total"])

    def level(self, began: float) -> Level:
        """Once nobody is there any more."""
        self.unsettled += not self._parties.quiet(QUIET_S)
        time.sleep(1.0)  # threads that have ended leave the system's books
        return Level(time.monotonic() - began, self._parties.states())


class _Visit:
    """One visitor's process."""

    def __init__(self, world: World, errand: Errand) -> None:
        self.errand, self.hung = errand, False
        self.report: Report | None = None
        self._pipe, theirs = fork_server().Pipe(duplex=False)
        self._process = fork_server().Process(target=visit, args=(theirs, world, errand), daemon=True)
        self._process.start()
        theirs.close()
        self._deadline = time.monotonic() + (STOPPED_S if errand.kind == "stop" else HANGS_S)

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return int(self._process.sentinel)

    def over(self) -> bool:
        """Whether it has ended, by itself or by force because its time is up."""
        alive = self._process.is_alive()
        if alive and time.monotonic() < self._deadline:
            return False
        self.hung = alive and self.errand.kind != "stop"
        if alive:
            self._process.kill()
        self._process.join()
        try:
            self.report = self._pipe.recv() if self._pipe.poll() else None
        except EOFError:  # it died before it had anything to say
            self.report = None
        self._pipe.close()
        return True


def _judge(
    run: Run,
    network: Network,
    swarm: _Swarm,
    levels: Sequence[Level],
    spent: Mapping[str, float],
    faults: Mapping[str, list[str]],
) -> None:
    """Figures, and the lines that this run must keep; what broke one is noted in words."""
    tally = swarm._tally
    for kind in KINDS:
        run.measure("visitors", tally.kinds[kind], "", network, of=kind)
    run.measure("replies that were compared", tally.replies, "", network, of="all")
    run.measure("tokens of the clients' replies", tally.tokens, "", network, of="all")
    run.measure("seeds and masked messages that were compared", len(tally.seen), "", network, of="all")
    for role, value in spent.items():
        run.measure("correlations", value, "", network, of=role)
    grown: dict[str, float] = {}
    for role in levels[0].states:
        for what in ("threads", "files", "sockets"):
            values = tuple(float(getattr(level.states[role], what)) for level in levels)
            run.measure(f"{what} when nobody is there", values[-1], "", network, of=role, samples=values)
        quiet = tuple(float(level.states[role].rss) for level in levels)
        run.measure("memory when nobody is there", quiet[-1], "B", network, of=role, samples=quiet)
        run.measure("memory in the crowd, at most", max(swarm.memory[role]), "B", network, of=role, samples=tuple(swarm.memory[role]))
        grown[role] = growth(quiet, 1)
        run.measure("memory, growth", grown[role], "B", network, of=role)
    left = leaks(levels[0].states, levels[-1].states)
    loud = [f"{role}: {line}" for role, lines in faults.items() for line in lines]
    fallen = sum(falls(values) for values in swarm.spent.values()) + (spent["server"] > spent["dealer"])
    for name, found in (
        (f"of {tally.replies} replies, not the reference reply", tally.wrong),
        ("well-behaved visitors that failed", len(tally.failed)),
        ("visitors that hung", len(tally.hung)),
        (f"of {len(tally.seen)} seeds and masked messages, seen twice", tally.twice),
        ("replies that left no seed or masked message to compare", tally.unproved),
        ("counters of correlations that fell, or spent what was not dealt", fallen),
        ("threads, files or sockets more than at the start, kinds", len(left)),
        ("times that the parties were not quiet after the crowd had left", swarm.unsettled),
        ("lines of a fault of their own in the logs", len(loud)),
        ("HTTP answers 500, and bad requests that were admitted", tally.faults + tally.admitted),
    ):
        run.require(name, "", 0, found)
    run.require("memory: growth of any party over the quiet moments", "MB", FLAT_BYTES / 1e6, max(grown.values()) / 1e6)
    for line in (*sorted(set(tally.failed))[:10], *sorted(set(tally.hung)), *left, *loud[:10]):
        run.note(f"broken: {line}")
    if not tally.replies:
        raise TransportError("no visitor got a reply", remedy="look at the notes of the result")
