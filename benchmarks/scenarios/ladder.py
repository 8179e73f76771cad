"""AERO's ladder: every network that lowers; the others are named with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.backends import backend
from benchmarks.measure import Run, interleave
from benchmarks.networks import GPT2, QUICK, count, made
from benchmarks.schema import Absent
from protocols.errors import RangeError, UnsupportedOpError

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
) -> None:
    """At GPT-2 size, or small; `networks` are names of the ladder, all if none is given."""
    sizes = QUICK if quick else GPT2
    chosen = [name.format(half=sizes["n_layer"] // 2) for name in networks or VARIANTS]
    largest = max(count(name, **sizes) for name in chosen)
    needed = sum(backend(name).needs(largest, seq, sizes["vocab_size"]) for name in backends)
    machine.require_memory(needed + 8 * largest, f"the ladder with {' and '.join(backends)}")
    for variant in chosen:
        try:
            network = made(variant, work, **sizes)
        except (UnsupportedOpError, RangeError) as error:
            run.absent.append(Absent(variant, str(error).splitlines()[0]))
            continue
        interleave(run, network, seq, backends, samples=samples, errors=1, link=link, device=device)
        shutil.rmtree(network.directory)
