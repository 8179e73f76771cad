"""How bytes, rounds and seconds grow with the prompt's length, the layers and the width, beside what `privinf explain` predicts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Run, interleave
from benchmarks.networks import made

VARIANT = "SM+ScFuFFN"
BASE = {"n_layer": 4, "n_head": 8, "n_embd": 256, "vocab_size": 3072, "n_positions": 512}
QUICK_BASE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 512, "n_positions": 512}
LENGTHS = (16, 32, 64, 128, 256, 512)
AT = 64  # tokens, while layers or width vary


def scale(run: Run, work: Path, *, quick: bool, samples: int, backends: Sequence[str], device: str = "cpu") -> None:
    """One network over all lengths; then its layers and its width halved and doubled."""
    base = QUICK_BASE if quick else BASE
    half = [{**base, name: base[name] // 2} for name in ("n_layer", "n_embd")]
    double = [{**base, name: base[name] * 2} for name in ("n_layer", "n_embd")]
    for sizes, lengths in ((base, LENGTHS), *((other, (AT,)) for other in (*half, *double))):
        network = made(VARIANT, work, **sizes)
        for seq in lengths:
            interleave(run, network, seq, backends, samples=samples, errors=1, device=device)
        shutil.rmtree(network.directory)
