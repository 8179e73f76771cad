"""One pass over several links: emulated in the transport and, where the kernel can, shaped by it in a network namespace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.links import NAMED, kernel_link, link_of
from benchmarks.measure import Run, interleave
from benchmarks.schema import Absent
from protocols.errors import ConfigError


def links(run: Run, work: Path, *, model: Path | None, seq: int, samples: int, names: Sequence[str], kernel: bool, device: str) -> None:
    """`names` as `--link` takes them, and `loopback`; with `kernel` the shaped ones once more, by traffic control."""
    network = run.network(model, work)
    for name in names:
        interleave(run, network, seq, ["privinf"], samples=samples, errors=0, link=NAMED.get(name, name), device=device)
    for wanted in [link_of(name) for name in names] if kernel else ():
        if wanted.rtt_ms is None or wanted.mbit_s is None:
            continue
        try:
            with kernel_link(wanted.rtt_ms, wanted.mbit_s) as link:
                if not link.rtt_ms:
                    run.note("kernel links: this kernel has no netem, so its traffic control (tbf) shapes the rate alone")
                interleave(run, network, seq, ["privinf"], samples=samples, errors=0, device=device, kernel=link)
        except ConfigError as error:
            run.absent.append(Absent("links shaped by the kernel", " ".join(str(error).split())))
            return
