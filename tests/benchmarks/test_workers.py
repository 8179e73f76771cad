"""What `python -m benchmarks workers` sees of processes: which serve, and what each has of its own."""

from __future__ import annotations

import mmap
import os

import pytest

from benchmarks.scenarios.workers import own_bytes, workers_of
from protocols.errors import ConfigError

SIZE = 64 << 20


def test_pages_that_are_shared_are_nobodys_own() -> None:
    """A child of a child is a worker; what it writes to is its own, and what it has from before the fork is not."""
    shared = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    shared.write(b"1" * SIZE)
    told, tell = os.pipe()
    waits, ends = os.pipe()
    if not (nursery := os.fork()):
        os.close(ends)
        if not os.fork():
            own = mmap.mmap(-1, SIZE // 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            own.write(b"1" * (SIZE // 2))
            os.write(tell, str(os.getpid()).encode())
        os.read(waits, 1)
        os._exit(0)
    os.close(waits)
    try:
        worker = int(os.read(told, 20))
        assert worker in workers_of(os.getpid())
        assert SIZE // 2 <= own_bytes(worker) < SIZE
    finally:
        os.close(ends)
        os.waitpid(nursery, 0)
        os.close(told)
        os.close(tell)
        shared.close()


def test_a_service_of_one_process_has_no_workers() -> None:
    with pytest.raises(ConfigError, match="has none"):
        workers_of(2**22 + 1)
