"""Settings and options of training runs that take a second."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {"batch": 4, "length": 32, "learning_rate": 1e-2, "warmup_steps": 5}
_RUN = {"layers": 2, "heads": 2, "width": 16, "positions": 32, "vocab": 300, "batch": 4, "warmup": 2, "threads": 1}
SMALL_RUN = [word for name, value in _RUN.items() for word in (f"--{name}", str(value))] + ["--json"]
