"""Trust models side by side: one network with a dealer, by the two parties alone, by stock CrypTen, by SPU's CHEETAH if it is here."""

from __future__ import annotations

from pathlib import Path

from benchmarks import machine
from benchmarks.backends import ALONE, OURS, backend
from benchmarks.measure import Run, interleave
from benchmarks.networks import GPT2, QUICK, count, made
from benchmarks.schema import Absent
from protocols.errors import ConfigError

BACKENDS = (OURS, ALONE, "crypten", "spu-cheetah")


def trust(run: Run, work: Path, *, quick: bool, seq: int, samples: int) -> None:
    """At GPT-2 size, or small. Backends one after the other, so that memory is that of the largest; one that is not here is named."""
    sizes = QUICK if quick else GPT2
    variant = f"SM+ScFuFFN_i{sizes['n_layer'] // 2}"
    found = []
    for name in BACKENDS:
        try:
            needed = backend(name).needs(count(variant, **sizes), seq, sizes["vocab_size"])
            machine.require_memory(needed, f"{variant} with {name}")
        except ConfigError as error:
            run.absent.append(Absent(name, str(error).splitlines()[0]))
        else:
            found.append(name)
    network = made(variant, work, **sizes)
    for name in found:
        interleave(run, network, seq, [name], samples=samples, errors=1)
