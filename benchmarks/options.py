"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from privinf.setting import Setting
from privinf.trust import TRUSTS
from protocols.errors import ConfigError


@dataclass(frozen=True)
class Files:
    """Where a scenario's result goes."""

    json: Annotated[Path | None, Setting("Write the result as JSON.", "FILE")] = None
    csv: Annotated[Path | None, Setting("Write the rows as CSV.", "FILE")] = None
    markdown: Annotated[Path | None, Setting("Write tables; without any file they go to stdout.", "FILE")] = None


Seq = Annotated[int, typer.Option("--seq", min=1, help="Tokens of the prompt.")]
Model = Annotated[Path | None, typer.Argument(metavar="MODEL", help="Left out: the shipped model's shape, random weights.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Timed passes of each backend, after one warm-up.")]
Backends = Annotated[str, typer.Option("--backends", metavar="A,B", help="Among privinf, crypten, plain, spu-semi2k, spu-cheetah.")]


def _device(text: str) -> str:
    """Checked before anything starts."""
    from benchmarks.backends.privinf_backend import devices_of
    from benchmarks.machine import require_devices

    require_devices(devices_of(text).values())
    return text


DEVICE = typer.Option("--device", metavar="D", callback=_device, help="cpu, cuda, or by party: client=cpu,server=cuda (privinf alone).")
Device = Annotated[str, DEVICE]
LinkName = Annotated[str | None, typer.Option("--link", metavar="lan|wan|4g|RTTms:MBITS", help="Emulate a link (privinf alone).")]


def _trust(text: str) -> str:
    if text not in TRUSTS:
        raise ConfigError(f"there is no trust model {text!r}", remedy=f"choose among {', '.join(TRUSTS)}")
    return text


TRUST = typer.Option("--trust", metavar="|".join(TRUSTS), callback=_trust, help="Who makes the correlations of ours.")
Trust = Annotated[str, TRUST]


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
