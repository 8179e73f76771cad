"""The shipped model, or any MODEL, at one length: ours against stock CrypTen and float, interleaved in one run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Run, interleave


def shipped(
    run: Run,
    work: Path,
    *,
    model: Path | None,
    seq: int,
    samples: int,
    errors: int,
    backends: list[str],
    link: str | None = None,
    device: str = "cpu",
) -> None:
    """Without a model a network of the shipped one's shape with random weights."""
    network = run.network(model, work)
    interleave(run, network, seq, backends, samples=samples, errors=errors, link=link, device=device)
