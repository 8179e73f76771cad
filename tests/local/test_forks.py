"""The processes of a local session: forked by one, ended with their exit codes, and by force even before they live."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from privinf.local.forks import Born, Forks
from privinf.local.session import _environment
from tests.support.waiting import PATIENCE


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Forks]:
    with (tmp_path / "errors").open("w+b") as errors:
        one = Forks(_environment(1), errors)
        yield one
        one.close()
    assert one.process.poll() is not None


def first_event(child: Born) -> dict[str, object]:
    assert child.stdout is not None
    found: dict[str, object] = json.loads(child.stdout.readline())
    return found


def test_parties_have_their_own_streams_sessions_and_ends(made: Forks, tmp_path: Path) -> None:
    """One ends by itself, with the code of a party that was not told anything, and one by a signal; another is still there."""
    with (tmp_path / "err").open("w+b") as err:
        children = {role: made.bear(role, err) for role in ("client", "server", "dealer")}
        assert [first_event(child)["event"] for child in children.values()] == ["alive"] * 3
        pids = {child.pid for child in children.values()}
        assert len(pids) == 3 and {os.getsid(pid) for pid in pids} == pids
        client, server, dealer = children.values()
        assert client.stdin is not None
        client.stdin.close()
        assert client.wait(PATIENCE) == 0 and client.poll() == 0
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(PATIENCE) == -signal.SIGTERM
        with pytest.raises(subprocess.TimeoutExpired):
            dealer.wait(0.01)
        assert dealer.poll() is None
        dealer.kill()
        assert dealer.wait(PATIENCE) == -signal.SIGKILL
        dealer.kill()  # it has gone, and its number may be another's


def test_parties_that_do_not_live_yet_are_ended(made: Forks) -> None:
    child = made.bear("client", None)
    child.kill()
    assert child.wait(PATIENCE) in (-signal.SIGKILL, 1) and child.pid == 0
    assert child.stdout is not None and child.stdout.read() == b""


def test_who_forks_is_killed_and_its_parties_with_it(made: Forks) -> None:
    child = made.bear("dealer", None)
    assert first_event(child)["event"] == "alive"
    made.process.kill()
    assert child.wait(PATIENCE) == -signal.SIGKILL
    assert child.stdout is not None
    child.stdout.read()  # its end: it is gone


def test_it_forks_before_it_has_threads() -> None:
    """What `main` loads starts none, so that a fork is whole."""
    code = """
import os, socket, threading
import privinf.local.forks as forks
forks._forking = lambda sock: print(threading.active_count(), len(os.listdir("/proc/self/task")))
os.environ["PRIVINF_CHANNEL"] = str(socket.socketpair()[0].detach())
forks.main()
"""
    out = subprocess.run([sys.executable, "-c", code], env=_environment(1), capture_output=True, text=True, check=True).stdout
    assert out.split() == ["1", "1"]
