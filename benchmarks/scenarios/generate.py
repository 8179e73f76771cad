"""Generation: the first token, one more token against the length of the cache, tokens per second; then what a service of it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.backends import OURS, backend, trusting
from benchmarks.links import link_of
from benchmarks.measure import Run, take
from benchmarks.networks import Network
from benchmarks.scenarios.batch import batch
from benchmarks.scenarios.serving import PROMPT, clients, memory, wan
from benchmarks.schema import Goal, median
from privinf.lowering.explain import explain
from privinf.trust import DEALER, TWO_PARTY

PARTS = ("cached", "batch", "clients", "memory", "wan")


@dataclass(frozen=True)
class Size:
    """How much of each part is done."""

    samples: int
    tokens: int  # of the long session, and of each of a batch of long replies
    clients: tuple[int, ...]  # at a time
    reply: int  # tokens of each of their replies
    all_tokens: int  # that memory is watched over
    sessions: int
    link: str  # that a token is timed over
    link_tokens: int
    batch: int = 8  # replies together


FULL = Size(2, 64, (2, 4, 8), 24, 1000, 100, "wan", 4)
QUICK = Size(1, 16, (4,), 6, 40, 10, "20ms:200", 1)


def generate(
    run: Run,
    work: Path,
    *,
    model: Path | None,
    lengths: Sequence[int],
    size: Size,
    link: str | None,
    parts: Sequence[str],
    trust: str = DEALER,
) -> None:
    """The parts by name, on one network, each with parties of its own; `link` is for the first alone."""
    network, (ours,) = run.network(model, work), trusting([OURS], trust)
    if "cached" in parts:
        cached(run, network, lengths=lengths, tokens=size.tokens, samples=size.samples, link=link, ours=ours)
    if "batch" in parts:
        batch(run, network, number=size.batch, tokens=(size.reply, size.tokens), samples=size.samples, trust=trust)
    if "clients" in parts:
        clients(run, network, work, counts=size.clients, tokens=size.reply, samples=size.samples, trust=trust)
    if "memory" in parts:
        memory(run, network, work, tokens=size.all_tokens, sessions=size.sessions, trust=trust)
    if "wan" in parts:
        wan(run, network, name=size.link, seq=min(64, network.lowered.info.n_positions // 2), tokens=size.link_tokens, ours=ours)


def cached(run: Run, network: Network, *, lengths: Sequence[int], tokens: int, samples: int, link: str | None, ours: str = OURS) -> None:
    """For each length of a prompt that fits, a session of one token and one of two: their difference is what one more token costs.

    Beside it the same token without a cache: a pass over one position more. Then one session of `tokens` after a short prompt.
    A session's set-up is kept after the first.
    """
    info, shaped = network.lowered.info, link_of(link)
    maker = backend(ours)
    machine.require_memory(maker.needs(network.parameters, max(lengths), info.vocab), "generation")
    fitting = [length for length in lengths if length < info.n_positions]
    used, done = maker(network, fitting[0], link=link), False

    def traffic(phase: str = "online") -> tuple[int, int, int]:
        cell = used.session.traffic[phase]
        return cell["sent"] + cell["received"], cell["payload"], cell["rounds"]

    def figure(name: str, value: float, unit: str, length: int, **more: object) -> None:
        run.measure(name, value, unit, network, length, of=ours, link=shaped, **more)

    unlike = 0
    try:
        with used:
            used.once(network.ids(fitting[0]))
            done = True
            for length in fitting:
                first, more, whole = [], [], []
                for number in range(samples):
                    ids = network.ids(length, number)
                    first.append(used.once(ids).seconds["online"])
                    one, ahead = traffic(), traffic("offline")
                    tokens_of = used.generate(ids, 2)
                    more.append(used.session.result["timing"]["per_token_s"][1])
                    wire, payload, rounds = (after - before for after, before in zip(traffic(), one, strict=True))
                    offline = [after - before for after, before in zip(traffic("offline"), ahead, strict=True)]
                    whole.append(used.once([*ids, tokens_of[0]]).seconds["online"])
                    uncached = traffic()
                pair = [explain(network.lowered, length, new_tokens=number, trust=maker.model)["total"] for number in (1, 2)]
                predicted = pair[1]["online_bytes"] - pair[0]["online_bytes"]
                unlike += payload != predicted
                figure("first token, seconds", median(first) or 0.0, "s", length, samples=tuple(first))
                figure("one more token, seconds", median(more) or 0.0, "s", length, samples=tuple(more))
                figure("one more token, bytes", wire, "B", length)
                figure("one more token, payload", payload, "B", length)
                figure("one more token, payload, predicted", predicted, "B", length)
                figure("one more token, rounds", rounds, "", length)
                if maker.model == TWO_PARTY:
                    made = [pair[1][name] - pair[0][name] for name in ("offline_bytes", "offline_rounds")]
                    unlike += offline[1:] != made
                    figure("one more token, offline bytes", offline[0], "B", length)
                    figure("one more token, offline rounds", offline[2], "", length)
                figure("the same token without a cache, seconds", median(whole) or 0.0, "s", length, samples=tuple(whole))
                figure("the same token without a cache, bytes", uncached[0], "B", length)
                figure("the same token without a cache, rounds", uncached[2], "", length)
            start = min(PROMPT, info.n_positions // 2)
            number = min(tokens, info.n_positions - start)
            used.generate(network.ids(start), number)
            timing = used.session.result["timing"]
            each = timing["per_token_s"]
            figure(f"tokens per second, online, over {number} tokens", number / sum(each), "1/s", start, samples=tuple(each))
            rate = number / (timing["offline_s"] + sum(each))
            figure(f"tokens per second, offline included, over {number} tokens", rate, "1/s", start)
    finally:
        if done:
            take(run, network, fitting[0], ours, used, shaped)
    run.require("lengths whose token costs other bytes than `explain` says", "", 0, unlike)
    if ours == OURS:
        counted = [m.value for m in run.measures if (m.name, m.of) == ("one more token, rounds", ours)]
        run.budget.append(Goal("rounds of a token, at most", "", "none exists", 64, 45, max(counted)))
    told = (("the dealer's part included", 1 / 30, 1 / 60), ("all phases", 2.5, 0.8))[maker.model == TWO_PARTY]
    run.budget.append(Goal(f"seconds a token over {number} tokens, {told[0]}", "s", "", *told[1:], 1 / rate))
