"""Generation: the first token, one more token against the length of the cache, tokens per second; then what a service of it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.links import link_of
from benchmarks.measure import Run, take
from benchmarks.networks import Network
from benchmarks.scenarios.serving import PROMPT, clients, memory, wan
from benchmarks.schema import Goal, median
from privinf.lowering.explain import explain

PARTS = ("cached", "clients", "memory", "wan")


@dataclass(frozen=True)
class Size:
    """How much of each part is done."""

    samples: int
    tokens: int  # of the long session
    clients: tuple[int, ...]  # at a time
    reply: int  # tokens of each of their replies
    all_tokens: int  # that memory is watched over
    sessions: int
    link: str  # that a token is timed over
    link_tokens: int


FULL = Size(2, 64, (2, 4, 8), 24, 1000, 100, "wan", 4)
QUICK = Size(1, 16, (4,), 6, 40, 10, "20ms:200", 1)


def generate(
    run: Run, work: Path, *, model: Path | None, lengths: Sequence[int], size: Size, link: str | None, parts: Sequence[str]
) -> None:
    """The parts by name, on one network, each with parties of its own; `link` is for the first alone."""
    network = run.network(model, work)
    if "cached" in parts:
        cached(run, network, lengths=lengths, tokens=size.tokens, samples=size.samples, link=link)
    if "clients" in parts:
        clients(run, network, work, counts=size.clients, tokens=size.reply, samples=size.samples)
    if "memory" in parts:
        memory(run, network, work, tokens=size.all_tokens, sessions=size.sessions)
    if "wan" in parts:
        wan(run, network, name=size.link, seq=min(64, network.lowered.info.n_positions // 2), tokens=size.link_tokens)


def cached(run: Run, network: Network, *, lengths: Sequence[int], tokens: int, samples: int, link: str | None) -> None:
    """For each length of a prompt that fits, a session of one token and one of two: their difference is what one more token costs.

    Beside it the same token without a cache: a pass over one position more. Then one session of `tokens` after a short prompt.
    A session's set-up is kept after the first.
    """
    info, shaped = network.lowered.info, link_of(link)
    machine.require_memory(PrivinfBackend.needs(network.parameters, max(lengths), info.vocab), "generation")
    fitting = [length for length in lengths if length < info.n_positions]
    used, done = PrivinfBackend(network, fitting[0], link=link), False

    def traffic() -> tuple[int, int, int]:
        online = used.session.traffic["online"]
        return online["sent"] + online["received"], online["payload"], online["rounds"]

    def figure(name: str, value: float, unit: str, length: int, **more: object) -> None:
        run.measure(name, value, unit, network, length, of="privinf", link=shaped, **more)

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
                    one = traffic()
                    tokens_of = used.generate(ids, 2)
                    more.append(used.session.result["timing"]["per_token_s"][1])  # type: ignore[index]
                    wire, payload, rounds = (after - before for after, before in zip(traffic(), one, strict=True))
                    whole.append(used.once([*ids, tokens_of[0]]).seconds["online"])
                    uncached = traffic()
                pair = [explain(network.lowered, length, new_tokens=number)["total"]["online_bytes"] for number in (1, 2)]
                unlike += payload != pair[1] - pair[0]
                figure("first token, seconds", median(first) or 0.0, "s", length, samples=tuple(first))
                figure("one more token, seconds", median(more) or 0.0, "s", length, samples=tuple(more))
                figure("one more token, bytes", wire, "B", length)
                figure("one more token, payload", payload, "B", length)
                figure("one more token, payload, predicted", pair[1] - pair[0], "B", length)
                figure("one more token, rounds", rounds, "", length)
                figure("the same token without a cache, seconds", median(whole) or 0.0, "s", length, samples=tuple(whole))
                figure("the same token without a cache, bytes", uncached[0], "B", length)
                figure("the same token without a cache, rounds", uncached[2], "", length)
            start = min(PROMPT, info.n_positions // 2)
            number = min(tokens, info.n_positions - start)
            used.generate(network.ids(start), number)
            timing = used.session.result["timing"]  # type: ignore[index]
            each = timing["per_token_s"]
            figure(f"tokens per second, online, over {number} tokens", number / sum(each), "1/s", start, samples=tuple(each))
            rate = number / (timing["offline_s"] + sum(each))
            figure(f"tokens per second, offline included, over {number} tokens", rate, "1/s", start)
    finally:
        if done:
            take(run, network, fitting[0], "privinf", used, shaped)
    run.require("lengths whose token costs other bytes than `explain` says", "", 0, unlike)
    run.budget.append(Goal(f"seconds a token over {number} tokens, the dealer's part included", "s", "", 0.1, 1 / 30, 1 / rate))
