"""Generation: the first token, one more token against the length of the cache, and tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.links import link_of
from benchmarks.measure import Run, take
from benchmarks.networks import SHIPPED, made, opened
from benchmarks.schema import median
from privinf.lowering.explain import explain


def generate(run: Run, work: Path, *, model: Path | None, lengths: Sequence[int], tokens: int, samples: int, link: str | None) -> None:
    """For each length of a prompt that fits, a session of one token and one of two: their difference is what one more token costs.

    Then one session of `tokens` after the shortest prompt. A session's set-up is cached after the first.
    """
    network = opened(model, work) if model else made("SM(t)+ScFuFFN", work, **SHIPPED)
    info, shaped = network.lowered.info, link_of(link)
    machine.require_memory(PrivinfBackend.needs(network.parameters, max(lengths), info.vocab), "generation")
    fitting = [length for length in lengths if length < info.n_positions]
    used, done = PrivinfBackend(network, fitting[0], link=link), False

    def traffic() -> tuple[int, int, int]:
        online = used.session.traffic["online"]
        return online["sent"] + online["received"], online["payload"], online["rounds"]

    def figure(name: str, value: float, unit: str, length: int, **more: object) -> None:
        run.measure(name, value, unit, network, length, of="privinf", link=shaped, **more)

    try:
        with used:
            used.once(network.ids(fitting[0]))
            done = True
            for length in fitting:
                first, more = [], []
                for number in range(samples):
                    ids = network.ids(length, number)
                    first.append(used.once(ids).seconds["online"])
                    one = traffic()
                    used.generate(ids, 2)
                    more.append(used.session.result["timing"]["per_token_s"][1])  # type: ignore[index]
                    wire, payload, rounds = (after - before for after, before in zip(traffic(), one, strict=True))
                pair = [explain(network.lowered, length, new_tokens=count)["total"]["online_bytes"] for count in (1, 2)]
                figure("first token, seconds", median(first) or 0.0, "s", length, samples=tuple(first))
                figure("one more token, seconds", median(more) or 0.0, "s", length, samples=tuple(more))
                figure("one more token, bytes", wire, "B", length)
                figure("one more token, payload", payload, "B", length)
                figure("one more token, payload, predicted", pair[1] - pair[0], "B", length)
                figure("one more token, rounds", rounds, "", length)
            count = min(tokens, info.n_positions - fitting[0])
            used.generate(network.ids(fitting[0]), count)
            each = used.session.result["timing"]["per_token_s"]  # type: ignore[index]
            figure(f"tokens per second, online, over {count} tokens", count / sum(each), "1/s", fitting[0], samples=tuple(each))
            timing = used.session.result["timing"]  # type: ignore[index]
            whole = timing["offline_s"] + sum(each)
            figure(f"tokens per second, offline included, over {count} tokens", count / whole, "1/s", fitting[0])
    finally:
        if done:
            take(run, network, fitting[0], "privinf", used, shaped)
