"""From a trained PyTorch module to a CrypTen graph that our protocols run.

Names are imported on first use, because they load torch and CrypTen, which a command line that only prints its help must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privinf.graph.info import Info
    from privinf.lowering.export import lower
    from privinf.lowering.from_checkpoint import convert
    from privinf.lowering.lowered import Lowered, load

__all__ = ["Info", "Lowered", "convert", "load", "lower"]

_HOMES = {
    "Info": "privinf.graph.info",
    "Lowered": "privinf.lowering.lowered",
    "convert": "privinf.lowering.from_checkpoint",
    "load": "privinf.lowering.lowered",
    "lower": "privinf.lowering.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
