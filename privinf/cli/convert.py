"""`privinf convert`: from a checkpoint to a lowered model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privinf.cli import common
from protocols.errors import ConfigError


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory with config.json and model.safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL", help="The directory to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a lowered model that is there; clients fetch the set-up of the new one.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Lower a checkpoint directory to a model that the parties can run.

    Every operator that has no protocol is named at once, with its module path.

    Example: privinf convert models/pylib -o lowered/pylib
    """
    from privinf.cli.screen import Screen
    from privinf.lowering import convert as lower_checkpoint
    from privinf.lowering.storage import check_target, is_lowered
    from privinf.session.report import model_of

    check_target(output)  # before the work
    if is_lowered(output) and not force:
        raise ConfigError(f"{output} holds a lowered model already", remedy="give --force to replace it, or another directory")
    with Screen(quiet=as_json, plain=True) as screen:
        screen.say(f"lowering {checkpoint}")
        lowered = lower_checkpoint(checkpoint)
        screen.say(f"writing {output}")
        lowered.save(output)
    if as_json:
        common.write_json({"output": str(output), "model": model_of(lowered)})
    else:
        info = lowered.info
        print(f"{output}: {info.variant}, {info.layers} layers, {info.heads} heads, width {info.width}, id {lowered.id}", file=sys.stderr)
        print(common.tokenizer_line(lowered.tokenizer_id), file=sys.stderr)
