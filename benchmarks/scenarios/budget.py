"""The byte budget of `docs/protocols.md` at GPT-2 size: what others published, what we must and want to reach, what is measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import machine
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.measure import Run, take
from benchmarks.micro import softmax_bytes
from benchmarks.networks import GPT2, Network, count, made
from benchmarks.published import SMALLEST
from benchmarks.scenarios.serving import one_more_token
from benchmarks.schema import Goal, median

MB, GB = 1e6, 1e9


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
            take(run, network, seq, "privinf", used)
            _table(run, network, seq, used)


def _table(run: Run, network: Network, seq: int, used: PrivinfBackend) -> None:
    def bytes_of(phase: str, party: str, peer: str | None, *, both: bool = True) -> int:
        rows = [r for r in run.rows if r.phase == phase and r.party == party and peer in (None, r.peer)]
        return sum(r.bytes_sent + (r.bytes_received if both else 0) for r in rows)

    memory = {m.of.split()[-1]: m.value for m in run.measures if m.name == "peak memory"}
    rounds = sum(r.rounds for r in run.rows if r.phase == "online" and r.party == "client")
    softmax = softmax_bytes(network, seq)
    run.measure("softmax, bytes per unmasked element", softmax, "B", network, seq, of="privinf")
    lines = [
        ("online bytes", "MB", "CrypTen 5600; SPU 3370 to 4650; SIGMA about 590", 170, 90, bytes_of("online", "client", "server") / MB),
        ("offline between S and C", "MB", "", 50, 30, bytes_of("offline", "client", "server") / MB),
        ("dealer to parties", "MB", "CrypTen 1080; SIGMA above 8600", 300, 120, bytes_of("offline", "dealer", None, both=False) / MB),
        ("set-up once per client and model", "MB", "none", 600, 355, bytes_of("setup", "client", "server") / MB),
        ("rounds", "", "CrypTen 1478; SIGMA 1128 (GELU, LayerNorm)", 450, 300, float(rounds)),
        ("peak memory of S", "GB", "CrypTen 3.5", 4, 2, memory.get("server", 0) / GB or None),
        ("peak memory of C", "GB", "CrypTen 3.5", 3, 1.5, memory.get("client", 0) / GB or None),
        ("peak memory of D", "GB", "CrypTen 3.5", 3, 1.5, memory.get("dealer", 0) / GB or None),
        ("softmax, bytes per unmasked element", "B", "SIGMA 118; SPU 536 to 1621; CrypTen 1488", 45, 29, softmax),
    ]
    run.budget[:0] = [Goal(name, unit, published, must, goal, measured) for name, unit, published, must, goal, measured in lines]
    for phase in ("setup", "offline", "online"):
        samples = used.samples(phase)
        run.measure(f"{phase} seconds", median(samples) or 0.0, "s", network, seq, of="privinf client", samples=samples)
