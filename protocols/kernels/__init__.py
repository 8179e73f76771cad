"""Compiled loops (Numba) for what torch and numpy take several passes, or many calls, for.

Each has a plain twin where it is used, bit for bit the same.

`start` gets them ready beside what else a process does: they are compiled once for a machine, by a process of its own and at low
priority, and kept beside this file or in a directory of this user's. Until they are there, and where Numba does not load, the twins are
used, so that no reply waits for a compiler. `status` says which. They run on the CPU, in the thread that calls them, and let others run.

What is kept is machine code: a directory to which others than this user and the administrator can write is not read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

OFF = "PRIVINF_KERNELS"
"""An environment variable: with 0 the plain twins are used."""
COMPILING_S = 300.0


class _State:
    """Of this process."""

    compiled: Any = None  # `protocols.kernels.compiled`
    why = "not asked for yet"
    thread: threading.Thread | None = None
    guard = threading.Lock()


fast: Any = None
"""The compiled functions, `protocols.kernels.compiled`, once they are there; None: use the twins."""


def status() -> str:
    """In one line."""
    return "compiled" if fast is not None else f"plain: {_State.why}"


def start(directory: Path | None) -> threading.Thread:
    """Gets them ready in a thread, once for this process; they are kept in this directory, or nowhere."""
    with _State.guard:
        if _State.thread is None:
            _State.thread = threading.Thread(target=_prepare, args=(directory,), name="kernels", daemon=True)
            _State.thread.start()
        return _State.thread


def load(directory: Path | None) -> None:
    """`start`, and waits until they are there, or until `status` says why they are not."""
    start(directory).join()


class Watcher(Protocol):
    """Is told of every compiled loop that its thread calls, after the call."""

    def kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Which, and on what."""


class _Watching(threading.local):
    by: Watcher | None = None


_watching = _Watching()


def watch(watcher: Watcher | None) -> None:
    """This thread's watcher from now on; None: no longer."""
    _watching.by = watcher


def watched() -> bool:
    """Whether this thread has a watcher."""
    return _watching.by is not None


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> None:
        function(*args)
        if _watching.by is not None:
            _watching.by.kernel(function, args)

    return call


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """The twins alone within, for tests and measurements."""
    global fast
    held, fast = fast, None
    try:
        yield
    finally:
        fast = held


def _prepare(directory: Path | None) -> None:
    global fast
    if os.environ.get(OFF) == "0":
        _State.why = f"switched off by {OFF}=0"
        return
    _State.why = "not compiled yet"
    try:
        from protocols.kernels import build

        with contextlib.ExitStack() as stack:
            kept = [path for path in (build.BESIDE, directory) if path is not None]
            where = next((path for path in kept if _trusted(path) and build.complete(path)), None)
            if where is None:
                where = next((path for path in kept if _writable(path)), None)
                if where is None:
                    with contextlib.suppress(OSError):
                        where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="privinf-kernels-")))
                if where is not None:
                    _compile(where)
            found = vars(build.read(where))
            fast = SimpleNamespace(**{name: _watched(each) for name, each in found.items() if hasattr(each, "py_func")})
    except Exception as error:  # a platform without LLVM, or a fault in it, must not take a party down
        _State.why = f"Numba does not load: {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def _trusted(directory: Path) -> bool:
    """Whether nobody but this user and the machine's administrator can write to it."""
    try:
        found = directory.stat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _writable(directory: Path) -> bool:
    """Whether this user can, and nobody else; it is made if need be."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return _trusted(directory)
    except OSError:
        return False


def _compile(directory: Path) -> None:
    """In another process, so that this one's threads do not wait for Python's lock; it finishes if this one ends."""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "protocols.kernels.build", str(directory)]
    done = subprocess.run(
        command, env=where, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=COMPILING_S, check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the compiler ended with {done.returncode}")
