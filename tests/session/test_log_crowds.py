"""Lines that come in crowds are few, and lines that nobody reads hold up nobody."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from privinf.local.child import _Forward
from privinf.session import outlet, sparing
from privinf.session.outlet import Outlet, unblocked
from privinf.session.sparing import Sparing
from protocols.errors import PrivinfError
from tests.support import trio as t
from tests.support.trio import Trio


class Hands:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Hands]:
    hands = Hands()
    monkeypatch.setattr(sparing.time, "monotonic", hands)
    yield hands
    monkeypatch.undo()  # before pytest asks for the time


def test_a_crowd_is_one_line_a_minute_and_its_number(clock: Hands, caplog: pytest.LogCaptureFixture) -> None:
    lines = Sparing(logging.getLogger("privinf.server"))
    for number in range(500):
        lines.say("silent", f"stranger {number} said nothing")
        lines.say("certificate", f"session {number} broke", 3)
    assert caplog.messages == ["stranger 0 said nothing", *(f"session {number} broke" for number in range(3))]
    caplog.clear()
    clock.now += 59
    assert lines.due() == pytest.approx(1.0) and not caplog.messages
    clock.now += 1
    assert lines.due() is None
    assert caplog.messages == [
        "499 more in the last 60 s like this one: stranger 499 said nothing",
        "497 more in the last 60 s like this one: session 499 broke",
    ]
    caplog.clear()
    lines.say("silent", "stranger 500 said nothing")
    assert caplog.messages == ["stranger 500 said nothing"]
    lines.say("silent", "stranger 501 said nothing")
    lines.due(at_once=True)
    assert len(caplog.messages) == 2


def test_kinds_are_bounded(clock: Hands, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can choose how to fail fills neither the log nor the memory."""
    lines = Sparing(logging.getLogger("privinf.server"))
    for number in range(1000):
        lines.say(f"way {number}", f"failed in way {number}")
    assert len(caplog.messages) == len(lines._windows) == 65


def test_faults_of_ours_are_one_line_too(parties: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With the place of the first."""
    monkeypatch.setattr(parties.server, "handle", lambda connection: 1 / 0)
    for _ in range(3):
        with pytest.raises(PrivinfError, match="internal error at the server"):
            list(parties.client(fresh=True).generate(ids=[1]))
    (record,) = [each for each in caplog.records if "internal error in a session" in each.getMessage()]
    assert record.levelno == logging.ERROR and record.exc_info and record.exc_info[0] is ZeroDivisionError


def test_what_is_not_read_is_dropped_counted_and_waits_for_nobody() -> None:
    reads, got = threading.Event(), list[str]()

    def write(line: str) -> None:
        reads.wait(30)
        got.append(line)

    lines = Outlet(write, lambda count: f"{count} dropped")
    for number in range(5000):
        lines.put(str(number))
    reads.set()
    t.wait_for(lambda: got and got[-1].endswith("dropped"), 20)
    count = int(got.pop().split()[0])
    assert got == [str(number) for number in range(5000 - count)] and 5000 - outlet._LINES - 1 <= count <= 5000 - outlet._LINES
    lines.put("more")
    lines.close()
    assert got[-1] == "more"


def test_a_services_streams_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of threads do not mix, the log goes the same way, and afterwards all is as before."""
    reader, writer = os.pipe()
    log, handler = logging.getLogger("tests.outlet"), logging.StreamHandler()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as out:
        handler.stream = stream
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
        with unblocked():
            threads = [threading.Thread(target=lambda: print("a", "whole", "line", file=sys.stderr)) for _ in range(50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            log.warning("logged")
            print("cut", end="", file=sys.stderr, flush=True)
        assert sys.stderr is stream and handler.stream is stream
        stream.close()
        assert out.read() == "a whole line\n" * 50 + "logged\ncut"


def test_an_end_waits_a_second_for_a_reader_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with unblocked():
            for _ in range(3000):
                print("x" * 200, file=sys.stderr)
        os.close(reader)  # which ends the thread that waits


def test_the_log_of_a_child_waits_for_no_parent() -> None:
    """Nor does whoever logs in it; what else it says to its parent is needed, and waits."""
    stopped = threading.Event()

    class Parent:
        def emit(self, event: str, **values: object) -> None:
            stopped.wait()

    handler = _Forward(Parent(), debug=False)  # type: ignore[arg-type]
    for _ in range(5000):
        handler.handle(logging.makeLogRecord({"name": "privinf", "msg": "one line"}))
    stopped.set()
    handler.close()
