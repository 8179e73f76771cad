"""Several replies in the same passes: tokens a second beside those of one reply, and the payload beside what `explain` says."""

from __future__ import annotations

import time

from benchmarks.backends import OURS
from benchmarks.measure import Run
from benchmarks.networks import Network
from benchmarks.schema import Goal, median
from privinf.local.session import LocalSession
from privinf.lowering.explain import explain
from privinf.session.options import Options
from privinf.trust import DEALER


def batch(run: Run, network: Network, *, number: int, tokens: int, samples: int, trust: str = DEALER) -> None:
    """`samples` times in turn one reply and `number` of them together, of `tokens` each, after prompts of up to 64 tokens.

    Rates are of whole replies: prompts, tokens, and what is made before each pass, the dealer's part included; set-up is kept from before.
    Both are warmed up alike: one reply and one batch come before what is timed, so that what a process does once for a shape (tapes of
    its passes, what is compiled or cached) is in neither. What that costs is a measure beside them: the first reply and the first batch of
    processes that have just been started, each with a session of its own, from the question to the last token, connections included.
    """
    info = network.lowered.info
    seq = min(64, info.n_positions // 2)
    tokens = min(tokens, info.n_positions - seq)
    prompts = [network.ids(seq, place) for place in range(number)]
    rates: dict[int, list[float]] = {1: [], number: []}

    def rate(session: LocalSession, count: int) -> float:
        began, asked = time.perf_counter(), prompts[:count]
        if count == 1:
            made = sum(1 for _ in session.generate(ids=asked[0], max_new_tokens=tokens, ignore_eos=True))
        else:
            made = sum(1 for _ in session.generate(ids=asked, max_new_tokens=tokens, ignore_eos=True))
        assert made == count * tokens
        return made / (time.perf_counter() - began)

    def fresh() -> LocalSession:
        return LocalSession(network.lowered, Options(trust=trust))

    with fresh() as session:
        for count in rates:
            rate(session, count)
        for _ in range(samples):
            for count in rates:
                rates[count].append(rate(session, count))
        payload, rounds = session.traffic["online"]["payload"], session.traffic["online"]["rounds"]
    cold = {}
    for count in rates:
        with fresh() as session:
            cold[count] = rate(session, count)
    predicted = explain(network.lowered, seq, new_tokens=tokens, batch=number, trust=trust)["total"]
    one, all_of_them = median(rates[1]) or 0.0, median(rates[number]) or 0.0
    run.measure("one reply, tokens a second", one, "1/s", network, seq, of=OURS, samples=tuple(rates[1]))
    run.measure(f"a batch of {number}, tokens a second", all_of_them, "1/s", network, seq, of=OURS, samples=tuple(rates[number]))
    run.measure(f"a batch of {number}, times one reply's rate", all_of_them / one, "x", network, seq, of=OURS)
    first = "the first of a process"
    run.measure(f"one reply, tokens a second, {first}", cold[1], "1/s", network, seq, of=OURS)
    run.measure(f"a batch of {number}, tokens a second, {first}", cold[number], "1/s", network, seq, of=OURS)
    run.measure(f"a batch of {number}, times one reply's rate, each {first}", cold[number] / cold[1], "x", network, seq, of=OURS)
    run.measure(f"a batch of {number}, payload", payload, "B", network, seq, of=OURS)
    run.measure(f"a batch of {number}, rounds", rounds, "", network, seq, of=OURS)
    unlike = (payload != predicted["online_bytes"]) + (rounds != predicted["rounds"])
    run.require(f"a batch of {number}: bytes and rounds that differ from what `explain` says", "", 0, unlike)
    if trust == DEALER:
        name = f"a batch of {number}: tokens a second over one client's, at least"
        run.budget.append(Goal(name, "x", "none exists", 3, 5, all_of_them / one))
