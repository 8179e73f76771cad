"""Several replies in the same passes: tokens a second beside those of one reply, and the payload beside what `explain` says."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.backends import OURS
from benchmarks.measure import Run
from benchmarks.networks import Network
from benchmarks.schema import Goal, median
from privinf.local.session import LocalSession
from privinf.lowering.explain import explain
from privinf.session.options import Options
from privinf.trust import DEALER


def batch(run: Run, network: Network, *, number: int, tokens: Sequence[int], samples: int, trust: str = DEALER) -> None:
    """`samples` times in turn one reply and `number` of them together, of each number of `tokens`, after prompts of up to 64 tokens.

    Rates are of whole replies: prompts, tokens, and what is made before each pass, the dealer's part included; set-up is kept from before.
    The first of `tokens` is what all figures are of; of others the rates are measured alone, since prompts are less of a longer reply.
    All are warmed up alike: one reply and one batch come before what is timed, so that what a process does once for a shape (tapes of
    its passes, what is compiled or cached) is in neither. What that costs is a measure beside them: the first reply and the first batch of
    processes that have just been started, each with a session of its own, from the question to the last token, connections included.
    """
    info = network.lowered.info
    seq = min(64, info.n_positions // 2)
    lengths = list(dict.fromkeys(min(count, info.n_positions - seq) for count in tokens))
    prompts = [network.ids(seq, place) for place in range(number)]

    def rate(session: LocalSession, count: int, tokens: int) -> float:
        began, asked = time.perf_counter(), prompts[:count]
        if count == 1:
            made = sum(1 for _ in session.generate(ids=asked[0], max_new_tokens=tokens, ignore_eos=True))
        else:
            made = sum(1 for _ in session.generate(ids=asked, max_new_tokens=tokens, ignore_eos=True))
        assert made == count * tokens
        return made / (time.perf_counter() - began)

    def fresh() -> LocalSession:
        return LocalSession(network.lowered, Options(trust=trust))

    for length in lengths:
        rates: dict[int, list[float]] = {1: [], number: []}
        with fresh() as session:
            for count in rates:
                rate(session, count, length)
            for _ in range(samples):
                for count in rates:
                    rates[count].append(rate(session, count, length))
            payload, rounds = session.traffic["online"]["payload"], session.traffic["online"]["rounds"]
        each = "" if length == lengths[0] else f", {length} tokens each"
        ratio = (median(rates[number]) or 0.0) / (median(rates[1]) or 1.0)
        for count, who in ((1, "one reply"), (number, f"a batch of {number}")):
            run.measure(
                f"{who}, tokens a second{each}", median(rates[count]) or 0.0, "1/s", network, seq, of=OURS, samples=tuple(rates[count])
            )
        run.measure(f"a batch of {number}, times one reply's rate{each}", ratio, "x", network, seq, of=OURS)
        if trust == DEALER:
            name = f"a batch of {number}{each}: tokens a second over one client's, at least"
            run.budget.append(Goal(name, "x", "none exists", 3, 5, ratio))
        predicted = explain(network.lowered, seq, new_tokens=length, batch=number, trust=trust)["total"]
        unlike = (payload != predicted["online_bytes"]) + (rounds != predicted["rounds"])
        run.require(f"a batch of {number}{each}: bytes and rounds that differ from what `explain` says", "", 0, unlike)
        if length == lengths[0]:
            run.measure(f"a batch of {number}, payload", payload, "B", network, seq, of=OURS)
            run.measure(f"a batch of {number}, rounds", rounds, "", network, seq, of=OURS)
    cold = {}
    for count in (1, number):
        with fresh() as session:
            cold[count] = rate(session, count, lengths[0])
    first = "the first of a process"
    run.measure(f"one reply, tokens a second, {first}", cold[1], "1/s", network, seq, of=OURS)
    run.measure(f"a batch of {number}, tokens a second, {first}", cold[number], "1/s", network, seq, of=OURS)
    run.measure(f"a batch of {number}, times one reply's rate, each {first}", cold[number] / cold[1], "x", network, seq, of=OURS)
