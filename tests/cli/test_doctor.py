"""`privinf doctor` against parties that run, each in a process: what is well, and what is wrong with which of them."""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from privinf.cli import app
from privinf.doctor import checks
from privinf.transport import keys
from protocols import kernels
from protocols.kernels import build
from tests.support import trio as t
from tests.support.command import Call
from tests.support.command import call as call
from tests.support.trio import Process, Services
from tests.support.waiting import PATIENCE

KEY = "sk-doctor-key"
Doctor = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    with t.services() as made:
        yield made


@pytest.fixture
def doctor(services: Services, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Calls it with the addresses of the services, or others: its exit code and its lines about the parties, then stderr's."""
    monkeypatch.setattr(app, "install", lambda: None)
    monkeypatch.delenv("PRIVINF_API_KEY", raising=False)

    def call(*words: object, **places: object) -> tuple[int, list[str]]:
        given = {"server": services.server_address, "dealer": services.dealer_address, "keys": t.keys(), **places}
        options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        code = app.main(
            ["doctor", "--cache", str(t.scratch() / "cache"), "--timeout", "60", "--connect-timeout", "10", *options, *map(str, words)]
        )
        out, err = capfd.readouterr()
        lines = [line for line in out.splitlines() if re.match(r"(ok  |FAIL)  (server|dealer|session|gateway)\b", line)]
        assert sum("trying again" not in line for line in err.splitlines()) == (1 if code else 0) and all(
            line.isprintable() for line in out.splitlines()
        )
        return code, [*lines, *([err] if code else [])]

    return call


@contextlib.contextmanager
def gateway(services: Services) -> Iterator[tuple[Process, str]]:
    common = ("--server", services.server_address, "--dealer", services.dealer_address, "--keys", t.keys(), "--api-key", KEY)
    with Process("gateway", *common, "--cache", t.scratch() / "cache", "--http", "127.0.0.1:0", "--json") as process:
        process.until("page: ")
        yield process, process.document()["address"]


@contextlib.contextmanager
def another_gateway(status: int, body: bytes) -> Iterator[str]:
    """Something that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(PATIENCE)


def test_a_deployment_that_is_well(services: Services, doctor: Doctor) -> None:
    model, digest = t.lowered().id, t.lowered().tokenizer_id
    with gateway(services) as (_, address):
        code, lines = doctor("--expect", model, "--api-key", KEY, gateway=address)
        assert code == 0 and lines == [
            f"ok    server at {services.server_address}: answers, serves the model {model}, tokenizer {digest}, does not grant logits",
            f"ok    dealer at {services.dealer_address}: answers as dealer to our client",
            "ok    session: server and dealer opened one for us",
            f"ok    gateway at {address}: answers, has the model {model}, takes the API key",
        ]
        code, lines = doctor("--api-key", "another-key", gateway=address, server=None, dealer=None)
        assert code == 3 and "refuses the API key" in lines[-1] and KEY not in lines[-1] and "another-key" not in lines[-1]
        code, lines = doctor(gateway=address, dealer=None)
        assert code == 0 and "ok    session: the server reaches its dealer" in lines
    # nothing of it counts as a failure there
    assert not [line for line in services.server.lines + services.dealer.lines if "error" in line]


def test_another_model_than_is_expected(services: Services, doctor: Doctor) -> None:
    code, lines = doctor("--expect", "f00d")
    assert code == 3 and f"has the model {t.lowered().id}, not the expected f00d" in lines[-1] and lines[0].startswith("FAIL  server")
    with another_gateway(200, b'{"status": "ok", "model": "f00d"}') as address:
        code, lines = doctor(gateway=address)
        assert code == 3 and f"has the model f00d, and the server {t.lowered().id}" in lines[-1]


def test_a_gateway_that_is_none_or_not_well(services: Services, doctor: Doctor) -> None:
    for place, says in ((services.dealer_address, "is no gateway of ours"), ("127.0.0.1:1", "could not connect"), ("here", "cannot read")):
        code, lines = doctor(gateway=place, server=None, dealer=None, keys=None)
        assert code == (2 if place == "here" else 3) and says in lines[-1]
    for status, body, says in (
        (503, b'{"status": "stopping"}', "answers 503: stopping"),
        (200, b"[]", "no gateway"),
        (200, b"x" * 99, "no gate"),
    ):
        with another_gateway(status, body) as address:
            code, lines = doctor(gateway=address, server=None, dealer=None, keys=None)
            assert code == 3 and says in lines[-1]


def test_a_certificate_of_another_ca_and_none(doctor: Doctor) -> None:
    code, lines = doctor(keys=t.other_ca())
    assert code == 3 and [line[:4] for line in lines[:2]] == ["FAIL", "FAIL"] and "was not signed by our CA" in lines[0]
    code, lines = doctor(keys=None)
    assert code == 2 and "give --keys" in lines[-1]
    code, lines = doctor(keys=t.keys() / "server")  # what a server may ask, of its dealer
    assert code == 2 and "for the role server, not client" in lines[0] and lines[1].endswith("answers as dealer to our server")


@pytest.mark.slow
def test_parties_that_were_taken_for_each_other_and_a_dealer_that_died(doctor: Doctor) -> None:
    with t.services() as mine:
        code, lines = doctor(server=mine.dealer_address, dealer=mine.server_address)
        assert code == 3 and "for the role dealer, not server" in lines[0] and "for the role server, not dealer" in lines[1]
        code, lines = doctor(server=mine.server_address)  # with the dealer of another server
        assert code == 3 and "FAIL  session" in lines[2] and "no server has announced this session" in lines[2]
        mine.dealer.send(signal.SIGKILL)
        mine.dealer.wait()
        code, lines = doctor(server=mine.server_address, dealer=mine.dealer_address)
        assert code == 3 and lines[0].startswith("ok ") and "could not connect" in lines[1] and len(lines) == 3
        code, lines = doctor(server=mine.server_address, dealer=None)
        assert code == 3 and f"cannot reach its dealer at {mine.dealer_address}" in lines[1]


# ---- clocks apart


@dataclass(frozen=True)
class ClockAhead:
    """A hook that sets a process's own clock ahead, as far as it looks at its own certificates."""

    days: int

    def __call__(self) -> None:
        keys._now = lambda: datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=self.days)


def keys_of(tmp_path: Path, days: int) -> Path:
    """Keys of ten days ago, but that the server's, for two days, were made by a clock that is so many days ahead, or behind."""
    place, other = tmp_path / "keys", tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_now", lambda: datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=10))
        keys.init_keys(place)
        shutil.copytree(place, other)
        patch.setattr(keys, "_now", lambda: datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days))
        keys.renew_keys(other, days=2)
    shutil.copytree(other / "server", place / "server", dirs_exist_ok=True)
    return place


@pytest.mark.parametrize(("days", "says"), [(3, "is not yet valid"), (-3, "has expired")])
def test_a_server_whose_clock_is_wrong(services: Services, doctor: Doctor, tmp_path: Path, days: int, says: str) -> None:
    place = keys_of(tmp_path, days)
    common = ("--dealer", services.dealer_address, "--cache", t.scratch() / "cache", "--keys")
    with Process("serve", t.lowered_directory(), "--listen", "127.0.0.1:0", *common, place) as honest:  # whose clock is right
        assert honest.wait() == 2 and "the clock here shows 20" in honest.err and honest.err.count("\n") == 1
    with Process("serve", t.lowered_directory(), "--listen", "127.0.0.1:0", *common, place, hook=ClockAhead(days)) as server:
        address = server.until("listens on").split(" listens on ")[1].split()[0]
        code, lines = doctor(server=address, dealer=None, keys=place / "client")
        assert code == 3 and f"the peer's certificate {says} by the clock here [20" in lines[-1] and "set the clock" in lines[-1]
        with Process("generate", "--server", address, *common, place / "client", "--prompt-ids", "1", "--timeout", "10") as client:
            assert client.wait() == 3 and f"{says} by the clock here" in client.err and client.err.count("\n") == 1
        assert "by its clock" in server.until_lines(2)[1] and "the clocks at both ends" in server.lines[1]


def test_a_clock_that_is_behind_here(tmp_path: Path, doctor: Doctor) -> None:
    code, lines = doctor(server=None, dealer=None, keys=keys_of(tmp_path, 3))
    assert code == 2 and "clock: 20" in lines[-1] and "is before the server's certificate was made" in lines[-1]


def test_where_no_loops_can_be_compiled_one_line_says_so_and_nothing_fails(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine without Numba's LLVM, or with a processor that it does not know."""

    def broken(directory: Path | None) -> None:
        raise OSError("Could not find or load libllvmlite.so")

    for holder, name, value in (
        (kernels, "fast", None),
        (kernels._State, "thread", None),
        (kernels._State, "why", ""),
        (kernels, "_compile", lambda directory: None),
    ):
        monkeypatch.setattr(holder, name, value)
    monkeypatch.setattr(build, "read", broken)
    done = call("doctor", "--cache", tmp_path)
    lines = [line for line in done.out.splitlines() if "kernels" in line]
    assert lines == ["ok    kernels: plain: Numba does not load: OSError: Could not find or load libllvmlite.so"] and not done.err


def test_a_dealers_installation_is_well_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what `deploy/dealer.txt` leaves out; and not for a party that needs it, nor to ask others."""
    version, absent = checks.importlib.metadata.version, {"crypten", "safetensors", "tokenizers", "pydantic"}

    def found(name: str) -> str:
        if name in absent:
            raise checks.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(checks.importlib.metadata, "version", found)

    def failed(**words: object) -> list[str]:
        return [check.name for check in checks.checks(cache=tmp_path, **words) if not check.ok]  # type: ignore[arg-type]

    assert failed() == failed(keys=t.keys() / "dealer") == []
    assert failed(keys=t.keys() / "server") == ["packages", "crypten"]
    assert failed(dealer="127.0.0.1:1") == ["peers"]
    absent -= {"tokenizers"}  # a server's, of which a part is missing
    assert failed() == ["packages", "crypten"]
