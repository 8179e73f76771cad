"""What `python -m benchmarks workers` sees of processes: which serve, and what each has of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.scenarios.workers import own_bytes, workers_of
from protocols.errors import ConfigError

SIZE = 64 << 20
PARTIES = f"""
import mmap, os, sys
def pages(size):
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.write(b"1" * size)
    return made
shared = pages({SIZE})
if not os.fork():
    if not os.fork():
        own = pages({SIZE // 2})
        print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
os.wait()
"""


def test_pages_that_are_shared_are_nobodys_own() -> None:
    """A child of a child is a worker; what it writes to is its own, and what it has from before the fork is not.

    Of small processes, since one that forks with many objects has every page that their counts are on for its own.
    """
    with subprocess.Popen([sys.executable, "-c", PARTIES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdin is not None and service.stdout is not None
        worker = int(service.stdout.readline())
        assert worker in workers_of(service.pid)
        assert SIZE // 2 <= own_bytes(worker) < SIZE
        service.stdin.close()


def test_a_service_of_one_process_has_no_workers() -> None:
    with pytest.raises(ConfigError, match="has none"):
        workers_of(2**22 + 1)
