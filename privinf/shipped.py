"""The model that comes with the package, so that an installation can show what it does: `privinf run` without a model."""

from __future__ import annotations

from pathlib import Path

from protocols.errors import ConfigError

NAME = "pylib"


def shipped_model() -> Path:
    """Its checkpoint, in an installation or in a checkout; ConfigError where an installation was made without it."""
    here = Path(__file__).resolve().parent
    for place in (here / NAME, here.parent / "models" / NAME):
        if (place / "config.json").is_file():
            return place
    raise ConfigError("this installation has no model of its own", remedy="give a checkpoint's directory")
