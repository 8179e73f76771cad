"""How the kernels are compiled and kept: with their signatures, when their module is imported.

`python -m protocols.kernels.build [DIR]` does it ahead of the first start.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.registry import cpu_target

from protocols.compiled import KEEPING

BESIDE = Path(__file__).parent / "__pycache__" / "kernels"
"""Where they are kept if this user can write there, or if they were compiled there ahead."""
COMPLETE = "complete"
_entries: list[tuple[Any, tuple[Any, ...]]] = []  # in the order in which they call each other


def compiled(*signatures: Any) -> Callable[[Callable[..., None]], Any]:
    """Of a function that `read` compiles for its signatures; without one it is part of those that call it."""

    def decorate(function: Callable[..., None]) -> Any:
        made = numba.njit(nogil=True)(function)
        if signatures:
            _entries.append((made, signatures))
        return made

    return decorate


@functools.cache
def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    processor = cpu_target.target_context.codegen().magic_tuple()
    digest.update(repr((str(Path(__file__)), numba.__version__, platform.python_version(), processor)).encode())
    return digest.hexdigest()[:32]


def _place(directory: Path) -> Path:
    """Where those of these sources, this compiler and this processor are kept."""
    return directory / _digest()


def complete(directory: Path) -> bool:
    """Whether all of them are kept there."""
    return (_place(directory) / COMPLETE).exists()


def read(directory: Path | None) -> Any:
    """All of them, in one module; compiles those that are not kept there. For other arrays than their signatures' they raise TypeError."""
    found = importlib.import_module("protocols.kernels.compiled")
    if directory is not None:
        with KEEPING:
            before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_place(directory))
            try:
                for made, _ in _entries:
                    made.enable_caching()
            finally:
                numba.config.CACHE_DIR = before
    for made, signatures in _entries:
        for signature in signatures:
            made.compile(signature)
        made.disable_compile()
    return found


def main(directory: Path) -> None:
    """Compiles them at low priority; of several processes one does it and the others wait."""
    os.nice(10)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete(directory):
            _place(directory).mkdir(mode=0o700, exist_ok=True)
            read(directory)
            (_place(directory) / COMPLETE).touch()


if __name__ == "__main__":
    build = importlib.import_module("protocols.kernels.build")  # the one that the kernels know
    build.main(Path(sys.argv[1]) if len(sys.argv) > 1 else BESIDE)
