"""Where a run took place: the machine, the versions, the commit, the memory that is left."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from protocols.errors import ConfigError

PACKAGES = ("torch", "crypten", "numpy", "cryptography", "msgspec", "spu")


def _field(path: str, name: str) -> str | None:
    try:
        with open(path) as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(name)), None)
    except OSError:
        return None


def available_bytes() -> int | None:
    """Memory that new processes may use, None where the system does not say."""
    text = _field("/proc/meminfo", "MemAvailable")
    return 1024 * int(text.split()[0]) if text else None


def require_memory(needed: int, what: str) -> None:
    """ConfigError before anything starts, if this machine has too little."""
    found = available_bytes()
    if found is not None and found < needed:
        raise ConfigError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, {found / 1e9:.1f} GB are free",
            remedy="choose a smaller network or fewer backends",
        )


def require_devices(names: Iterable[str]) -> None:
    """ConfigError for a device that this machine lacks: its rows are absent then, never invented."""
    import torch

    for name in names:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError):
            raise ConfigError(
                f"the device {name!r} is not here", remedy="leave --device out; the rows of a device are measured on it"
            ) from None


def machine() -> dict[str, Any]:
    """Public facts: no names, no paths."""
    memory = _field("/proc/meminfo", "MemTotal")
    return {
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": 1024 * int(memory.split()[0]) if memory else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads_per_party": 1,
        "pinning": "none",
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that matter; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


MEASURED = (":/privinf", ":/protocols", ":/benchmarks", ":/models", ":/setup.cfg", ":(top,exclude)*.md", ":(top,exclude)*.png")
"""What a figure may depend on: all of the checkout but its words and pictures, which the report itself writes."""


def commit() -> str:
    """The commit, with `+` where what is measured differs from it; empty outside a checkout."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command(words: Sequence[str] | None = None) -> str:
    """How a run with these words, or this one, is asked for; a path outside the working directory keeps its last part alone."""
    shown = [word if not os.path.isabs(word) else f".../{Path(word).name}" for word in (sys.argv[1:] if words is None else words)]
    return " ".join(["python -m benchmarks", *shown])


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
