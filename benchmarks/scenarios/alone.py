"""The budget of the two parties alone at GPT-2 size, all phases but set-up: others' figures, what we must and want, what is measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks import machine
from benchmarks.backends import ALONE
from benchmarks.backends.privinf_backend import TwoPartyBackend
from benchmarks.callers import clear_prompts
from benchmarks.measure import Run, interleave, take
from benchmarks.micro import softmax_bytes
from benchmarks.networks import GPT2, Network, count, made
from benchmarks.published import BASELINE, SMALLEST
from benchmarks.schema import Goal, median
from privinf.lowering.explain import explain
from privinf.trust import TWO_PARTY

MB, GB = 1e6, 1e9
STOCK = 1 << 13
"""Positions of the stock that a pass is priced from."""
TOKENS = 16  # of the prompt and of the reply, where a model is asked from nothing


@dataclass(frozen=True)
class Extent:
    """How much is measured: the network's shape, and what else is asked for."""

    sizes: dict[str, int] = field(default_factory=lambda: {**GPT2, "n_positions": 1024})
    seq: int = 128
    samples: int = 1
    layers: str = SMALLEST  # the network's name
    whole_baseline: bool = False  # run it, and not its prediction alone


def alone(run: Run, work: Path, *, shipped: Path | None, extent: Extent) -> None:
    """One network, a model that is asked from nothing (none: that is left out), a softmax by itself, and what the baseline costs.

    What has been measured stands in the table where the rest fails.
    """
    sizes, found = extent.sizes, dict[str, float]()
    machine.require_memory(TwoPartyBackend.needs(count(extent.layers, **sizes), extent.seq, sizes["vocab_size"]), "the budget")
    network = made(extent.layers, work, **sizes)
    run.note(f"weights of {extent.layers}: {network.weights}; largest attention score {network.largest_score:.1f}")
    try:
        _from_stock(run, network, extent, found)
        _passes(run, network, extent, found)
        if shipped is not None:
            _shipped(run, run.network(shipped, work), found)
        found["softmax"] = softmax_bytes(network, extent.seq, TWO_PARTY)
        run.measure("softmax, bytes per unmasked element, offline and online", found["softmax"], "B", network, extent.seq, of=ALONE)
        _baseline(run, work, extent, found)
    finally:
        run.budget[:0] = _table(extent, found, dealt=explain(network.lowered, extent.seq)["total"]["online_bytes"])


def _from_stock(run: Run, network: Network, extent: Extent, found: dict[str, float]) -> None:
    """A pass whose rows come from a stock, and its part of the stock: predicted, which is what is counted."""
    prediction = explain(network.lowered, extent.seq, trust=TWO_PARTY, stock=STOCK)
    total, stock = prediction["total"], prediction["stock"]
    found["stock"], live = float(stock["offline_bytes"]), float(total["offline_bytes"] + total["online_bytes"])
    found["from stock"] = live + stock["used_bytes"]
    for name, value in (
        (f"bytes of a stock of rows for {STOCK} positions, predicted", found["stock"]),
        ("bytes of a pass, offline and online, from it, predicted", live),
        ("its part of the stock, bytes, predicted", float(stock["used_bytes"])),
    ):
        run.measure(name, value, "B", network, extent.seq, of=ALONE)
    made = f"a stock for {STOCK} positions has rows of {stock['maps']} maps and takes {found['stock'] / GB:.2f} GB once"
    run.note(f"{made}; a pass from it adds {live / MB:.0f} MB")


def _passes(run: Run, network: Network, extent: Extent, found: dict[str, float]) -> None:
    """The first pass has the set-up, and its bytes are the rows; then `samples` that are timed, and one that reveals its logits."""
    used, seq, passes = TwoPartyBackend(network, extent.seq), extent.seq, 0
    try:
        with used:
            for number in range(extent.samples + 1):
                used.once(network.ids(seq, number))
                passes += 1
            logits = used.once(network.ids(seq), logits=True).logits
            assert logits is not None
            error = float((logits - network.floats(network.ids(seq))).abs().max())
            run.measure("worst logit error", error, "", network, seq, of=f"{ALONE}, random weights")
    finally:
        if passes:
            take(run, network, seq, ALONE, used)
            found |= _counted(run, network, seq, used)


def _counted(run: Run, network: Network, seq: int, used: TwoPartyBackend) -> dict[str, float]:
    """Bytes and rounds of the rows, the client's seconds, and that every payload is the predicted one."""
    client = [r for r in run.rows if r.party == "client"]
    found = {phase: float(sum(r.bytes_sent + r.bytes_received for r in client if r.phase == phase)) for phase in PHASES}
    found["payload"] = float(sum(r.payload or 0 for r in client if r.phase == "online"))
    found["rounds"] = float(sum(r.rounds for r in client if r.phase == "offline"))
    for phase in PHASES:
        samples = used.samples(phase)
        found[f"{phase} seconds"] = median(samples) or 0.0
        run.measure(f"{phase} seconds", found[f"{phase} seconds"], "s", network, seq, of=f"{ALONE} client", samples=samples)
    memory = [m.value for m in run.measures if m.name == "peak memory"]
    figures = {m.name: m.value for m in run.measures if m.of == ALONE}
    unlike = [name for name, value in figures.items() if figures.get(f"{name}, predicted", value) != value]
    run.require("figures of bytes and rounds that are not as `explain` says", "", 0, len(unlike))
    return found | ({"memory": max(memory)} if memory else {})


PHASES = ("setup", "offline", "online")


def _shipped(run: Run, network: Network, found: dict[str, float]) -> None:
    """A reply from nothing, the start of the processes and the set-up included; the only one that a correct system can give."""
    (prompt,) = clear_prompts(network, 1, TOKENS, TOKENS)
    times, began, used = list[float](), time.monotonic(), TwoPartyBackend(network, TOKENS)
    with used:
        reply = []
        for token in used.session.generate(ids=prompt.ids, max_new_tokens=TOKENS, ignore_eos=True):
            times.append(time.monotonic())
            reply.append(token.id)
    more = tuple(after - before for before, after in pairwise(times))
    found["from nothing"], found["token"] = times[-1] - began, median(more) or 0.0
    name = f"{TOKENS} tokens after {TOKENS} from nothing, seconds"
    run.measure(name, found["from nothing"], "s", network, TOKENS, of=ALONE)
    run.measure("one more token, seconds, all phases", found["token"], "s", network, TOKENS, of=ALONE, samples=more)
    run.require("tokens of the shipped model that are not float's", "", 0, sum(a != b for a, b in zip(reply, prompt.reply, strict=True)))


def _baseline(run: Run, work: Path, extent: Extent, found: dict[str, float]) -> None:
    """With LayerNorm and GELU: what is predicted, which is what is counted, and a pass of it if that is asked for."""
    network = made(BASELINE, work, **extent.sizes)
    total = explain(network.lowered, extent.seq, trust=TWO_PARTY)["total"]
    found["baseline"] = float(total["offline_bytes"] + total["online_bytes"])
    run.measure("bytes of a pass, offline and online, predicted", found["baseline"], "B", network, extent.seq, of=ALONE)
    if extent.whole_baseline:
        interleave(run, network, extent.seq, [ALONE], samples=1, errors=1)


def _table(extent: Extent, found: dict[str, float], *, dealt: float) -> list[Goal]:
    """A row for each line of the budget; `dealt`: online payload of the same pass with a dealer."""

    def of(*names: str, scale: float = 1.0) -> float | None:
        return sum(found[name] for name in names) / scale if all(name in found for name in names) else None

    where = f"{extent.layers}, {extent.seq} tokens"
    others = "AERO 6290; SPU CHEETAH 4650; BumbleBee 2770 at T = 64"
    made = f"{found['stock'] / GB:.1f} GB" if "stock" in found else "not priced"
    name = f"bytes of a pass, offline and online, from a stock of rows for {STOCK} positions ({made}), its part of that included, predicted"
    stock = Goal(name, "MB", others, 750, 450, of("from stock", scale=MB))
    lines = [
        (f"bytes of a pass of {where}, offline and online, that stands alone", "MB", others, 1000, 650, of("offline", "online", scale=MB)),
        (
            "seconds of it, offline and online",
            "s",
            "AERO 254 on 2 x 32 cores; SPU CHEETAH 771",
            100,
            35,
            of("offline seconds", "online seconds"),
        ),
        (
            "its online part, payload; must: as with a dealer",
            "MB",
            "none has one",
            dealt / MB,
            0.9 * dealt / MB,
            of("payload", scale=MB),
        ),
        ("set-up once per client and model", "MB", "with a dealer 354", 1300, 600, of("setup", scale=MB)),
        ("peak memory of a party", "GB", "AERO's machines had 256", 6, 3, of("memory", scale=GB)),
        ("offline rounds", "", "", 120, 60, of("rounds")),
        (f"shipped model: {TOKENS} tokens after {TOKENS} from nothing", "s", "none exists", 60, 20, of("from nothing")),
        ("shipped model: a further token, all phases", "s", "none exists", 2.5, 0.8, of("token")),
        ("softmax, bytes per unmasked element, offline and online", "B", "BumbleBee 720 to 824; SPU CHEETAH 1621", 450, 280, of("softmax")),
        (f"bytes of a pass of {BASELINE}, offline and online, predicted", "MB", "AERO 25300", 6000, 3000, of("baseline", scale=MB)),
    ]
    goals = [Goal(*line) for line in lines]
    return [goals[0], stock, *goals[1:]]
