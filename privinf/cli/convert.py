"""`privinf convert`: from a checkpoint to a lowered model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privinf.cli import common


def convert(
    checkpoint: common.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL", help="The directory to write.")],
    as_json: common.Json = False,
) -> None:
    """Lower a checkpoint directory to a model that the parties can run.

    Every operator that has no protocol is named at once, with its module path.

    Example: privinf convert models/pylib -o lowered/pylib
    """
    from privinf.lowering import convert as lower_checkpoint

    lowered = lower_checkpoint(checkpoint)
    lowered.save(output)
    info = lowered.info
    if as_json:
        model = {
            "variant": info.variant,
            "layers": info.layers,
            "heads": info.heads,
            "width": info.width,
            "vocab": info.vocab,
            "id": info.id,
        }
        common.write_json({"output": str(output), "model": model})
    else:
        print(f"{output}: {info.variant}, {info.layers} layers, {info.heads} heads, width {info.width}, id {info.id}", file=sys.stderr)
