"""The budget of `docs/protocols.md` at GPT-2 size: what others published, what we must and want to reach, what is measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import choose, machine
from benchmarks.backends import OURS
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.measure import Run, take
from benchmarks.micro import softmax_bytes
from benchmarks.networks import GPT2, Network, count, made
from benchmarks.published import SMALLEST
from benchmarks.scenarios.serving import one_more_token
from benchmarks.schema import Goal, Link, median
from privinf.lowering.explain import explain
from privinf.trust import ENCRYPTED

MB, GB = 1e6, 1e9
FAR = Link(60.0, 305.0)
"""That a pass and a token are priced over."""


def budget(run: Run, work: Path, *, seq: int, samples: int, positions: int) -> None:
    """One network, ours alone, and a further token of it."""
    sizes = {**GPT2, "n_positions": positions}
    machine.require_memory(PrivinfBackend.needs(count(SMALLEST, **sizes), seq, GPT2["vocab_size"]), "the budget")
    network = made(SMALLEST, work, **sizes)
    run.note(f"weights of {SMALLEST}: {network.weights}; largest attention score {network.largest_score:.1f}; {positions} positions")
    used = PrivinfBackend(network, seq)
    passes = 0
    try:
        with used:
            for number in range(samples + 1):
                used.once(network.ids(seq, number))
                passes += 1
            one_more_token(run, network, used, samples=samples)
            exact = network.floats(network.ids(seq))
            logits = used.once(network.ids(seq), logits=True).logits
            assert logits is not None
            run.measure("worst logit error", float((logits - exact).abs().max()), "", network, seq, of="privinf, random weights")
    finally:
        if passes:
            take(run, network, seq, OURS, used)
            _table(run, network, seq, used)


def bounded(network: Network) -> bool:
    """Whether the rows of every softmax stay within a range, so that none takes a maximum: it has goals of its own."""
    return all(node.plan.within is not None for node in network.lowered.graph.nodes if node.op == "attention")


def _table(run: Run, network: Network, seq: int, used: PrivinfBackend) -> None:
    def bytes_of(phase: str, party: str, peer: str | None, *, both: bool = True) -> int:
        rows = [r for r in run.rows if r.phase == phase and r.party == party and peer in (None, r.peer)]
        return sum(r.bytes_sent + (r.bytes_received if both else 0) for r in rows)

    memory = {m.of.split()[-1]: m.value for m in run.measures if m.name == "peak memory"}
    online = [r for r in run.rows if r.phase == "online" and r.party == "client"]
    seconds, rounds = median(used.samples("online")), sum(r.rounds for r in online)
    softmax = softmax_bytes(network, seq)
    run.measure("softmax, bytes per unmasked element", softmax, "B", network, seq, of=OURS)
    free = bounded(network)
    run.note(f"{SMALLEST}: the rows of its softmaxes are {'within a range, and no maximum is taken' if free else 'beyond a range'}")
    far = choose.latency(online, FAR.rtt_ms or 0.0, FAR.mbit_s or 1.0, seconds or 0.0)
    lines = [
        ("online bytes", "MB", "CrypTen 5500; SPU 3400 to 4700; SIGMA about 590", 88, 72, bytes_of("online", "client", "server") / MB),
        ("offline between S and C", "MB", "", 17, 8, bytes_of("offline", "client", "server") / MB),
        (
            "dealer to parties",
            "MB",
            "CrypTen 1080; SIGMA above 8600",
            95 if free else 117,
            80,
            bytes_of("offline", "dealer", None, both=False) / MB,
        ),
        ("set-up once per client and model", "MB", "none", 365, 250, bytes_of("setup", "client", "server") / MB),
        ("rounds", "", "CrypTen 1449; SIGMA 1128 (GELU, LayerNorm)", 150 if free else 230, 110 if free else 200, float(rounds)),
        ("online seconds", "s", "AERO 254, LAN, 2 x 32 threads", 1.2, 0.8, seconds),
        ("a pass over 60 ms, 305 Mbit/s, by rounds x RTT / 2 + bytes / rate", "s", "", 12, 9, far),
        ("peak memory of S", "GB", "CrypTen 3.4", 1.8, 1.2, memory.get("server", 0) / GB or None),
        ("peak memory of C", "GB", "CrypTen 3.4", 1.4, 1, memory.get("client", 0) / GB or None),
        ("peak memory of D", "GB", "CrypTen 3.4", 1.1, 0.8, memory.get("dealer", 0) / GB or None),
        ("softmax, bytes per unmasked element", "B", "SIGMA 118; SPU 536 to 1621; CrypTen 1488", 24 if free else 29, 20, softmax),
    ]
    sealed = explain(network.lowered, seq, embedding=ENCRYPTED)["total"]
    lines += [
        ("online bytes with an encrypted embedding, as predicted", "MB", "", 77, 61, sealed["online_bytes"] / MB),
        ("set-up with it, as predicted", "MB", "none", 833, 718, sealed["setup_bytes"] / MB),
    ]
    run.budget[:0] = [Goal(name, unit, published, must, goal, measured) for name, unit, published, must, goal, measured in lines]
    for phase in ("setup", "offline", "online"):
        samples = used.samples(phase)
        run.measure(f"{phase} seconds", median(samples) or 0.0, "s", network, seq, of="privinf client", samples=samples)
