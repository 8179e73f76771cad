"""Server and client alone, as processes: killed while a query is prepared, a set-up that was cut or is another's, a strange peer."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from privinf.client.client import Client
from privinf.lowering.encrypted import Sealing
from privinf.session.options import Options
from tests.support import trio as t
from tests.support.duo import Served, served
from tests.support.failures import failed, new_lines
from tests.support.faults import Fault, SmallFiles
from tests.support.plain_ends import PlainEnds
from tests.support.trio import Hook, Process
from tests.support.waiting import PATIENCE

PROMPT = [1, 2, 3]
slow = pytest.mark.slow


@dataclass(frozen=True)
class Plain:
    """Plain ends, and then another hook."""

    then: Hook

    def __call__(self) -> None:
        PlainEnds()()
        self.then()


def answer(process: Process) -> dict[str, Any]:
    """A reply, which must be right."""
    assert process.wait() == 0, process.err
    result: dict[str, Any] = json.loads(process.out)
    assert t.is_greedy(PROMPT, result["tokens"])
    return result


def prepared(*caches: Path) -> list[int]:
    return [len(list((cache / "prepared").rglob("*.bin"))) for cache in caches]


# ---- killed while a query is prepared


@pytest.mark.parametrize(
    ("role", "number"), [("client", 30), ("server", 40), pytest.param("client", 4, marks=slow), pytest.param("server", 5, marks=slow)]
)
def test_killed_while_a_query_is_prepared(tmp_path: Path, role: str, number: int) -> None:
    """Nothing is left that could be used by half; the next one is prepared, spent by both and used, once."""
    caches = mine, theirs = tmp_path / "client", tmp_path / "server"
    words = ("--cache", mine, "--max-new-tokens", 2)
    with served("--cache", theirs) as pair:
        peer = "server" if role == "client" else "client"
        with pair.faulty(Fault(role, f"{peer}:offline", number)) as faulty:
            client = faulty.generate("--seq", 3, *words, verb="prepare")
            code = client.wait()
        if role == "client":
            assert code == -signal.SIGKILL
        else:
            assert code in (3, 4) and len(client.said) == 1 and pair.server.wait() == -signal.SIGKILL
        assert prepared(*caches) == [0, 0]
        if role == "client":
            _prepare_and_use(pair, words, caches)
    if role == "server":
        with served("--cache", theirs) as again:
            _prepare_and_use(again, words, caches)


def _prepare_and_use(pair: Served, words: tuple[object, ...], caches: tuple[Path, ...]) -> None:
    made = pair.generate("--seq", 3, *words, "--json", verb="prepare")
    assert made.wait() == 0, made.err
    index = json.loads(made.out)["prepared"][0]["index"]
    marks = [[json.loads(path.read_text())["spent"] for path in cache.rglob("spent/*.json")] for cache in caches]
    assert prepared(*caches) == [1, 1] and all(spent < index for each in marks for spent in each)
    assert answer(pair.generate(*words, "--ignore-eos", "--json"))["prepared"] and prepared(*caches) == [0, 0]
    assert not answer(pair.generate(*words, "--ignore-eos", "--json"))["prepared"]


# ---- a set-up that was cut, or is another's


def test_a_set_up_that_was_cut_goes_on_and_one_that_is_anothers_is_fetched_anew(tmp_path: Path) -> None:
    parts = Sealing.of(t.lowered()).parts
    words = ("--cache", tmp_path, "--max-new-tokens", 1, "--json")
    with served() as pair:
        whole = answer(pair.generate("--cache", tmp_path / "other", "--max-new-tokens", 1, "--json"))["traffic"]["setup"]["payload"]
        said, largest = len(pair.server.lines), max((tmp_path / "other").rglob("setup/*/*/*.bin"), key=lambda path: path.stat().st_size)
        line = failed(pair.generate(*words, hook=Plain(SmallFiles(largest.stat().st_size - 1))), (2,))
        assert f"cannot write {tmp_path}" in line and "client" in new_lines(pair.server, said)[0]
        kept = sorted(tmp_path.glob("setup/*/*/*.bin"))
        assert 0 <= len(kept) < len(parts)
        cut = answer(pair.generate(*words))["traffic"]["setup"]["payload"]
        assert cut <= whole and (cut < whole) == bool(kept)
        # of another model under this name, whole and with its own digest; and one that was changed by a bit
        files = sorted(tmp_path.glob("setup/*/*/*.bin"))
        assert len(files) == len(parts)
        first, second = files[0], files[-1]
        second.write_bytes(first.read_bytes())
        data = bytearray(first.read_bytes())
        data[len(data) // 2] ^= 1
        first.write_bytes(bytes(data))
        again = answer(pair.generate(*words))["traffic"]["setup"]["payload"]
        assert 0 < again < whole
        assert answer(pair.generate(*words))["traffic"]["setup"]["payload"] < again


# ---- a strange peer, against the real ends


@dataclass(frozen=True)
class Strange:
    """A client that is none of ours: its messages of a phase are ones, or a byte short, or its transfers have another set of parameters."""

    how: str
    label: tuple[str, str] = ("", "preprocess")

    def __call__(self) -> None:
        if self.how == "parameters":
            from protocols.ot import pool
            from protocols.security import LPN_EMP

            pool.LPN = LPN_EMP  # type: ignore[attr-defined]
            return
        from privinf.transport.endpoint import Endpoint
        from privinf.transport.frames import FrameKind

        own = Endpoint._frames_of

        def frames_of(end: Endpoint, kind: FrameKind, body: Any) -> Any:
            if kind is FrameKind.DATA and end.meter.label == self.label and len(body):
                body = b"\xff" * len(body) if self.how == "ones" else bytes(len(body) - 1)
            return own(end, kind, body)

        Endpoint._frames_of = frames_of  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server with the real ends, to which a client has been already; and that client's cache."""
    cache = tmp_path_factory.mktemp("real")
    with served("--cache", cache / "server", plain=False) as pair:
        ours(pair, cache)
        yield pair, cache


def ours(pair: Served, cache: Path) -> None:
    answer(pair.generate("--cache", cache, "--max-new-tokens", 1, "--json", plain=False))


STRANGE = {
    "other parameters": (Strange("parameters"), "expected a message of"),
    "a ciphertext too short": (Strange("short"), "expected a message of"),
    "a transfer too short": (Strange("short", ("", "begin")), "expected a message of"),
    "points that are none": (Strange("ones", ("", "begin")), "none of the group"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_client_is_told_so_in_one_line_and_the_next_one_is_served(real: tuple[Served, Path], what: str) -> None:
    (pair, cache), (hook, words) = real, STRANGE[what]
    said = len(pair.server.lines)
    process = pair.generate("--cache", cache, "--max-new-tokens", 2, hook=hook)
    line = failed(process, (3, 4))
    told = new_lines(pair.server, said)[0]
    assert words in told or words in line, (told, line)
    assert "internal" not in told and "Traceback" not in told
    ours(pair, cache)


def test_a_client_that_makes_nonsense_gets_nonsense_or_one_line_and_the_next_one_is_served(real: tuple[Served, Path]) -> None:
    """Of residues every one may be in range; what comes of it is this client's loss."""
    pair, cache = real
    said = len(pair.server.lines)
    process = pair.generate("--cache", cache, "--max-new-tokens", 2, hook=Strange("ones"))
    if process.wait() != 0:
        failed(process, (3, 4))
    ours(pair, cache)
    assert len(pair.server.lines) - said <= 1 and "internal" not in pair.server.err and "Traceback" not in pair.server.err


# ---- many at once


@slow
def test_the_memory_of_a_server_with_eight_clients_at_once_is_as_it_is_told(real: tuple[Served, Path]) -> None:
    """Half a gigabyte for itself and 80 MB a session that does little: less than `docs/deployment.md` allows each."""
    pair, cache = real
    together = threading.Barrier(8)

    def query(number: int) -> list[int]:
        client = Client(pair.address, keys=str(t.keys()), options=Options(cache=cache, timeout=PATIENCE))
        client.connect()
        together.wait(PATIENCE)
        return [token.id for token in client.generate(ids=PROMPT, max_new_tokens=3, ignore_eos=True)]

    with ThreadPoolExecutor(8) as pool:
        assert all(t.is_greedy(PROMPT, tokens) for tokens in pool.map(query, range(8)))
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pair.server.pid}/status").read_text())
    assert int(peak) * 1024 < 0.5e9 + 8 * 80e6
