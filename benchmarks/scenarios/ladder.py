"""AERO's ladder: every network that lowers; the others are named with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.backends import OURS, backend
from benchmarks.measure import Run, interleave
from benchmarks.networks import GPT2, QUICK, count, made
from benchmarks.published import BASELINE, SMALLEST
from benchmarks.schema import Absent, Goal
from protocols.errors import ConfigError, RangeError, UnsupportedOpError

VARIANTS = (
    "SM+LN+G",
    "SM+LN+R",
    "SM+LN",
    "SM+G",
    "SM+R",
    "SM+ScFFN",
    "SM+ScFuFFN",
    "SM+ScFuFFN_i{half}",
    "SM(t)+ScFuFFN",
    "SM(t)+ScFuFFN_i{half}",
)

GOALS = {SMALLEST: (18, 27), BASELINE: (8, 12)}
"""Stock CrypTen's online seconds over ours: must and goal."""


def ladder(
    run: Run,
    work: Path,
    *,
    quick: bool,
    seq: int,
    samples: int,
    backends: Sequence[str],
    link: str | None = None,
    device: str = "cpu",
    networks: Sequence[str] = (),
    beside: Sequence[str] = (),
) -> None:
    """At GPT-2 size, or small; `networks` are names of the ladder, all if none is given; stock CrypTen runs those of `beside` too."""
    sizes = QUICK if quick else GPT2
    chosen, both = ([name.format(half=sizes["n_layer"] // 2) for name in names] for names in (networks or VARIANTS, beside))
    if unknown := sorted(set(both) - set(chosen)):
        raise ConfigError(f"{unknown[0]!r} is not among the networks that are measured")

    def names_of(variant: str) -> list[str]:
        return [*dict.fromkeys([*backends, "crypten"])] if variant in both else [*backends]

    for variant in chosen:
        size, names = count(variant, **sizes), names_of(variant)
        needed = 8 * size + sum(backend(name).needs(size, seq, sizes["vocab_size"]) for name in names)
        machine.require_memory(needed, f"{variant} with {' and '.join(names)}")
    for variant in chosen:
        try:
            network = made(variant, work, **sizes)
        except (UnsupportedOpError, RangeError) as error:
            run.absent.append(Absent(variant, str(error).splitlines()[0]))
            continue
        interleave(run, network, seq, names_of(variant), samples=samples, errors=2 if variant in both else 1, link=link, device=device)
        shutil.rmtree(network.directory)
        if not quick and OURS in names and variant in GOALS:
            run.budget += _goals(run, variant)


def _goals(run: Run, variant: str) -> list[Goal]:
    """At GPT-2 size, with a dealer: what the baseline moves, and how many times stock CrypTen's speed is ours where it was run."""
    online = [r for r in run.rows if (r.variant, r.backend, r.phase, r.alone) == (variant, OURS, "online", False)]
    seconds = {m.of: m.value for m in run.measures if (m.variant, m.name) == (variant, "online seconds")}
    ratio = [m.value for m in run.measures if (m.variant, m.name, m.of) == (variant, "online seconds, times ours", "crypten")]
    must, goal = GOALS[variant]
    lines = [Goal(f"{variant}: stock CrypTen's online seconds over ours, at least", "x", "", must, goal, ratio[-1])] if ratio else []
    if variant == BASELINE:
        size = sum(r.bytes_sent for r in online) / 1e6
        lines.append(Goal(f"online bytes, {variant}", "MB", "SIGMA 880; CrypTen 10200", 280, 220, size))
        lines.append(Goal(f"online seconds, {variant}", "s", "AERO 493, LAN, 2 x 32 threads", 4.5, 3, seconds.get(OURS)))
    return lines
