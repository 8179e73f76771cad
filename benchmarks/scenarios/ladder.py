"""AERO's ladder: every network that lowers; the others are named with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.backends import backend
from benchmarks.measure import Run, interleave
from benchmarks.networks import GPT2, QUICK, count, made
from benchmarks.published import BASELINE
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
        if variant == BASELINE and not quick:
            online = sum(r.bytes_sent for r in run.rows if (r.variant, r.backend, r.phase) == (BASELINE, "privinf", "online"))
            run.budget.append(Goal(f"online bytes, {BASELINE}", "MB", "SIGMA 880", 600, 350, online / 1e6))
