"""Generation as a service: clients side by side, memory over many tokens and sessions, a token over a slow link and at GPT-2 size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.backends import OURS, backend
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.callers import Answer, Caller, Clear, clear_prompts
from benchmarks.deployment import Deployment, state_of
from benchmarks.links import link_of
from benchmarks.measure import Run
from benchmarks.networks import Network
from benchmarks.schema import Goal, median
from privinf.trust import DEALER, TWO_PARTY
from protocols.errors import ConfigError

MB = 1e6
FAIR = 3.0
"""The worst wait of a client among n may be this many times n waits of a client alone."""
FLAT_BYTES = 16e6
"""Memory is flat if a party holds at most so much more at the end than after the warm-up: allocators give back in pieces of this order."""
PROMPT = 16


@dataclass(frozen=True)
class Crowd:
    """What the callers of one round saw: whole tokens a second, and the worst waits, for a first token and between two."""

    rate: float
    first: float
    between: float


def crowd(answers: Sequence[Answer]) -> Crowd:
    """Of answers that were asked for at the same time."""
    seconds = max(a.times[-1] for a in answers) - min(a.began for a in answers)
    between = [after - before for a in answers for before, after in pairwise(a.times)]
    return Crowd(sum(len(a.tokens) for a in answers) / seconds, max(a.times[0] - a.began for a in answers), max(between, default=0.0))


def wrong(answers: Sequence[Answer], prompts: Sequence[Clear]) -> int:
    """How many are not the reply."""
    return sum(answer.tokens != prompt.reply for answer, prompt in zip(answers, prompts, strict=True))


def clients(run: Run, network: Network, work: Path, *, counts: Sequence[int], tokens: int, samples: int, trust: str = DEALER) -> None:
    """Each client is a process; a reply is a session of its own, from the handshake to the last token.

    First every client by itself, one after the other: that is the set-up, one client's rate, and the single-client reply, which must
    be float's, as every later one must. Then `samples` rounds of each count of clients at once.
    """
    prompts = clear_prompts(network, max(counts), PROMPT, tokens)
    differ, done = 0, 0
    with Deployment(network.directory, work / "clients", timeout=PATIENCE[trust], trust=trust) as parties, ExitStack() as stack:
        callers = [stack.enter_context(Caller(parties.places, work / f"client-{number}", parties.timeout)) for number in range(max(counts))]

        def round_of(places: Sequence[int]) -> list[Answer]:
            nonlocal differ, done
            for place in places:
                callers[place].ask(prompts[place].ids, tokens)
            answers = [callers[place].take() for place in places]
            differ += wrong(answers, [prompts[place] for place in places])
            done += len(answers)
            return answers

        for place in range(len(callers)):
            callers[place].ask(prompts[place].ids, 2)
            callers[place].take()  # the set-up, which is kept
        alone = [round_of([place])[0] for place in range(len(callers))]
        rates = [crowd([answer]).rate for answer in alone]
        first = median(a.times[0] - a.began for a in alone) or 0.0
        token = median(after - before for a in alone for before, after in pairwise(a.times)) or 0.0
        rounds = {count: [crowd(round_of(range(count))) for _ in range(samples)] for count in counts}

    one = median(rates) or 0.0

    def figure(name: str, count: int, samples: Sequence[float], unit: str = "") -> float:
        value = median(samples) or 0.0
        run.measure(name, value, unit, network, PROMPT, of=f"{count} client{'s' if count > 1 else ''}", samples=tuple(samples))
        return value

    figure("tokens a second, all clients", 1, rates, "1/s")
    figure("first token, worst wait", 1, [a.times[0] - a.began for a in alone], "s")
    worst = ratio = 0.0
    for count, found in rounds.items():
        together = figure("tokens a second, all clients", count, [each.rate for each in found], "1/s")
        figure("first token, worst wait", count, [each.first for each in found], "s")
        figure("next token, worst wait", count, [each.between for each in found], "s")
        shares = [max(each.first / first, each.between / token) / count for each in found]
        share = figure("worst wait, in fair shares", count, shares)
        if count == max(rounds):
            worst, ratio = share, one / together
    run.note(
        f"clients: replies of {tokens} tokens to prompts of {PROMPT}, a process for each client, a session for each reply; the fair share "
        "of a wait among n clients is n times the median wait of a client alone, for a first token (its session included) or a next one"
    )
    run.require(f"of {done} replies, not the single client's", "", 0, differ)
    most = max(rounds)
    run.budget += [
        Goal(f"{most} clients: one client's tokens a second over all of theirs", "x", "", 1.0, 0.7, ratio),
        Goal(f"{most} clients: worst wait, in fair shares", "x", "", FAIR, 1.5, worst),
    ]


def growth(levels: Sequence[float], warm: int) -> float:
    """By how much the last third is above what came right after the first `warm` levels, as medians of equally many."""
    rest = levels[warm:]
    part = max(1, len(rest) // 3)
    return (median(rest[-part:]) or 0.0) - (median(rest[:part]) or 0.0)


def memory(run: Run, network: Network, work: Path, *, tokens: int, sessions: int, trust: str = DEALER) -> None:
    """Resident memory of the processes: over `sessions` sessions of two tokens, then over `tokens` tokens in as few sessions as fit.

    Levels are taken while no query runs. The sessions come first, so that the long replies find the parties warm.
    """
    room = network.lowered.info.n_positions - PROMPT
    longest = min(room, max(2, tokens // 5))
    with (
        Deployment(network.directory, work / "memory", timeout=PATIENCE[trust], trust=trust) as parties,
        Caller(parties.places, work / "client", parties.timeout) as caller,
    ):
        pids = {"server": parties.verbs["server"].pid, "client": caller.pid}
        pids |= {role: verb.pid for role, verb in parties.verbs.items() if role == "dealer"}

        def levels(count: int, each: int) -> dict[str, list[float]]:
            found: dict[str, list[float]] = {role: [] for role in pids}
            for number in range(count):
                caller.ask(network.ids(PROMPT, number), each)
                if len(caller.take().tokens) != each:
                    raise ConfigError("a reply has fewer tokens than were asked for")
                parties.quiet(10.0)
                time.sleep(0.1)  # what the session held is given back
                for role, pid in pids.items():
                    found[role].append(float(state_of(pid).rss))
            return found

        by_sessions = levels(sessions, 2)
        by_tokens = levels(-(-tokens // longest) + 1, longest)  # the first warms up what a long sequence needs
    worst = 0.0
    for name, found, warm in ((f"{sessions} sessions", by_sessions, sessions // 10 + 1), (f"{tokens} tokens", by_tokens, 1)):
        for role, values in found.items():
            more = growth(values, warm)
            worst = max(worst, more)
            run.measure(f"memory, growth over {name}", more, "B", network, PROMPT, of=role, samples=tuple(values))
    run.note(
        "memory: resident bytes after each session; growth is the median of the last third above that of the first after the warm-up; "
        f"flat is at most {FLAT_BYTES / MB:g} MB; of the {tokens} tokens a reply has {longest}"
    )
    run.budget.append(
        Goal(f"memory: growth of any party over {sessions} sessions, {tokens} tokens", "MB", "", FLAT_BYTES / MB, 4, worst / MB)
    )


PATIENCE = {DEALER: 60.0, TWO_PARTY: 600.0}
"""Seconds that a party waits for a message, by the trust model: where the two are alone, a peer may be making a pass."""


def gaps(used: PrivinfBackend, ids: list[int], count: int) -> list[float]:
    """Seconds between the tokens of a reply as the caller sees them, everything included; one fewer than tokens."""
    times = []
    for _ in used.session.generate(ids=ids, max_new_tokens=count, ignore_eos=True):
        times.append(time.monotonic())
    return [after - before for before, after in pairwise(times)]


def wan(run: Run, network: Network, *, name: str, seq: int, tokens: int, ours: str = OURS) -> None:
    """A further token over an emulated link, beside rounds x RTT + bytes / rate, where a round is half a round trip.

    The seconds are those between two tokens as the caller sees them, the offline part included; rounds and bytes those of the online
    phase alone, of the fuller direction.
    """
    link, used = link_of(name), backend(ours)(network, seq, link=name)
    assert link.rtt_ms is not None and link.mbit_s is not None
    with used:
        used.generate(network.ids(seq), 1)
        one = used.session.traffic["online"]
        seconds = gaps(used, network.ids(seq), 1 + tokens)
        more = used.session.traffic["online"]
    rounds = (more["rounds"] - one["rounds"]) / tokens
    size = max(more[way] - one[way] for way in ("sent", "received")) / tokens
    model = rounds * link.rtt_ms / 2000 + size / (link.mbit_s * 125_000)
    measured = median(seconds) or 0.0
    where = f"{link.rtt_ms:g} ms, {link.mbit_s:g} Mbit/s"
    run.measure("one more token, seconds", measured, "s", network, seq, of="over a link", link=link, samples=tuple(seconds))
    run.measure("rounds x RTT / 2 + bytes / rate", model, "s", network, seq, of="over a link", link=link)
    if ours == OURS:  # without a dealer the offline part, which the model leaves out, is most of it
        run.budget.append(Goal(f"a token over {where}: seconds over rounds x RTT / 2 + bytes / rate", "x", "", 1.2, 1.05, measured / model))


def one_more_token(run: Run, network: Network, used: PrivinfBackend, *, samples: int) -> None:
    """At GPT-2 size, after a pass of `used`: online bytes and rounds as counted, seconds with and without the dealer's part.

    As the first pass of a shape warms up the others, so do the first two tokens, which the parties write down to replay those that follow.
    """
    whole, online, seq = [], [], used.seq
    one = used.session.traffic["online"]
    first = gaps(used, network.ids(seq, samples), 3)
    for number in range(samples):
        whole += gaps(used, network.ids(seq, number), 3)
        online += used.session.result["timing"]["per_token_s"][1:]  # type: ignore[index]
    more = used.session.traffic["online"]
    size = sum(more[way] - one[way] for way in ("sent", "received")) / 2
    rounds = (more["rounds"] - one["rounds"]) / 2
    for name, value, unit, taken in (
        ("one more token, bytes", size, "B", ()),
        ("one more token, rounds", rounds, "", ()),
        ("the first further tokens of a length, seconds", max(first), "s", first),
        ("one more token, seconds", median(whole) or 0.0, "s", whole),
        ("one more token, online seconds", median(online) or 0.0, "s", online),
    ):
        run.measure(name, value, unit, network, seq, of="GPT-2 size", samples=tuple(taken))
    where = f"GPT-2 size, a token with {seq} cached"
    run.budget += [
        Goal(f"{where}: online bytes", "MB", "none exists", 1.4, 1.0, size / MB),
        Goal(f"{where}: online seconds", "s", "none exists", 0.15, 0.1, median(online)),
        Goal(f"{where}: seconds, the dealer's part included", "s", "none exists", 0.25, 0.15, median(whole)),
    ]
