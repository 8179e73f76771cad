"""AERO's ladder: every network that lowers today; the others are named with the reason."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Run, interleave
from benchmarks.networks import GPT2, QUICK, made
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


def ladder(run: Run, work: Path, *, quick: bool, seq: int, samples: int, backends: list[str], link: str | None) -> None:
    """At GPT-2 size, or small."""
    sizes = QUICK if quick else GPT2
    for name in VARIANTS:
        variant = name.format(half=sizes["n_layer"] // 2)
        try:
            network = made(variant, work, **sizes)
        except (UnsupportedOpError, RangeError) as error:
            run.absent.append(Absent(variant, str(error).splitlines()[0]))
            continue
        interleave(run, network, seq, backends, samples=samples, errors=1, link=link)
