"""The byte budget of `docs/protocols.md` at GPT-2 size: what others published, what we must and want to reach, what is measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import machine
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.measure import Run, take
from benchmarks.micro import softmax_bytes
from benchmarks.networks import GPT2, Network, made
from benchmarks.schema import Goal, median
from privinf.lowering.explain import explain

VARIANT = "SM+ScFuFFN_i6"
BASELINE = "SM+LN+G"
MB, GB = 1e6, 1e9


def budget(run: Run, work: Path, *, seq: int, samples: int, positions: int) -> None:
    """One network, ours alone; then the prediction for the ladder's baseline."""
    network = made(VARIANT, work, **{**GPT2, "n_positions": positions})
    machine.require_memory(PrivinfBackend.needs(network.parameters, seq, network.lowered.info.vocab), "the budget")
    run.note(f"weights of {VARIANT}: {network.weights}; largest attention score {network.largest_score:.1f}; {positions} positions")
    used = PrivinfBackend(network, seq)
    more: dict[str, float] = {}
    passes = 0
    try:
        with used:
            for number in range(samples + 1):
                used.once(network.ids(seq, number))
                passes += 1
            one = used.session.traffic["online"]
            used.generate(network.ids(seq), 2)
            two = used.session.traffic["online"]
            more["bytes"] = sum(two[key] - one[key] for key in ("sent", "received"))
            more["rounds"] = two["rounds"] - one["rounds"]
            more["seconds"] = used.session.result["timing"]["per_token_s"][1]  # type: ignore[index]
            exact = network.floats(network.ids(seq))
            logits = used.once(network.ids(seq), logits=True).logits
            assert logits is not None
            run.measure("worst logit error", float((logits - exact).abs().max()), "", network, seq, of="privinf, random weights")
    finally:
        if passes:
            take(run, network, seq, "privinf", used)
            _table(run, network, seq, used, more)
    # payload as `explain` predicts it, which the tests hold equal to what is counted on every network of the ladder
    baseline = explain(made(BASELINE, work, **{**GPT2, "n_positions": positions}).lowered, seq)["total"]["online_bytes"]
    run.budget.append(Goal(f"online bytes, {BASELINE} (predicted)", "MB", "SIGMA 880", 600, 350, baseline / MB))


def _table(run: Run, network: Network, seq: int, used: PrivinfBackend, more: dict[str, float]) -> None:
    def bytes_of(phase: str, party: str, peer: str | None, *, both: bool = True) -> int:
        rows = [r for r in run.rows if r.phase == phase and r.party == party and peer in (None, r.peer)]
        return sum(r.bytes_sent + (r.bytes_received if both else 0) for r in rows)

    memory = {m.of.split()[-1]: m.value for m in run.measures if m.name == "peak memory"}
    rounds = sum(r.rounds for r in run.rows if r.phase == "online" and r.party == "client")
    run.measure("softmax, bytes per unmasked element", softmax_bytes(network, seq), "B", network, seq, of="privinf")
    softmax = run.measures[-1].value
    lines = [
        ("online bytes", "MB", "CrypTen 5600; SPU 3400 to 4700; SIGMA about 590", 170, 90, bytes_of("online", "client", "server") / MB),
        ("offline between S and C", "MB", "", 50, 30, bytes_of("offline", "client", "server") / MB),
        ("dealer to parties", "MB", "CrypTen 1080; SIGMA above 8600", 300, 120, bytes_of("offline", "dealer", None, both=False) / MB),
        ("set-up once per client and model", "MB", "none", 600, 355, bytes_of("setup", "client", "server") / MB),
        ("rounds", "", "CrypTen 1478; SIGMA 1128 (GELU, LayerNorm)", 450, 300, float(rounds)),
        ("peak memory of S", "GB", "CrypTen 3.5", 4, 2, memory.get("server", 0) / GB or None),
        ("peak memory of C", "GB", "CrypTen 3.5", 3, 1.5, memory.get("client", 0) / GB or None),
        ("peak memory of D", "GB", "CrypTen 3.5", 3, 1.5, memory.get("dealer", 0) / GB or None),
        ("softmax, bytes per unmasked element", "B", "SIGMA 118; SPU 536 to 1621; CrypTen 1488", 45, 29, softmax),
        ("one more token, 128 cached", "MB", "no system does it", 2.5, 1.5, more["bytes"] / MB if more else None),
    ]
    run.budget += [Goal(name, unit, published, must, goal, measured) for name, unit, published, must, goal, measured in lines]
    for phase in ("setup", "offline", "online"):
        samples = used.samples(phase)
        run.measure(f"{phase} seconds", median(samples) or 0.0, "s", network, seq, of="privinf client", samples=samples)
    if more:
        run.measure("one more token, bytes", more["bytes"], "B", network, seq, of="privinf client")
        run.measure("one more token, seconds", more["seconds"], "s", network, seq, of="privinf client")
        run.measure("one more token, rounds", more["rounds"], "", network, seq, of="privinf client")
