"""The harness: its schema, that sums of rows are totals are the parties' socket counters, and its errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import benchmarks
from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.measure import Run, interleave
from benchmarks.micro import cases, run_case
from benchmarks.networks import Network, made
from benchmarks.output import as_csv, markdown
from benchmarks.scenarios import ladder as scenario
from benchmarks.schema import VERSION, Result, check, encode, median, read
from protocols.errors import ConfigError, UnsupportedOpError

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return made("SM(t)+ScFuFFN", tmp_path_factory.mktemp("network"), **TINY)


@pytest.fixture(scope="module")
def run(network: Network) -> Run:
    """Ours against stock CrypTen and float, one sample each."""
    found = Run("test")
    interleave(found, network, 5, ["privinf", "crypten", "plain"], samples=1, errors=1)
    return found


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "result.json"
    path.write_bytes(encode(run.result(True)))
    yield path


def test_ours_wins_over_the_package_that_crypten_installs() -> None:
    assert Path(benchmarks.__file__ or "").parent == ROOT / "benchmarks"


def test_rows_are_the_socket_counters(network: Network) -> None:
    backend = PrivinfBackend(network, 5)
    with backend:
        backend.once(network.ids(5))
    rows = backend.counted().rows
    for party, counters in backend.session.parties.items():
        for phase in ("setup", "offline", "online"):
            own = [row for row in rows if (row.party, row.phase) == (party, phase)]
            if phase == "online":  # the client's counters were read before it said goodbye
                assert 0 <= sum(r.bytes_sent for r in own) - counters["traffic"][phase]["sent"] <= 128
                assert 0 <= sum(r.bytes_received for r in own) - counters["traffic"][phase]["received"] <= 128
            links = [link[phase] for link in backend.session.details[party]["links"]]
            for rows_say, socket_says in (("bytes_sent", "sent"), ("bytes_received", "received"), ("rounds", "rounds")):
                assert sum(getattr(r, rows_say) for r in own) == sum(link[socket_says] for link in links)


def test_both_ends_of_a_link_count_the_same(run: Run) -> None:
    """What one party's socket sent online, the other's received, up to the last words of TLS that nobody reads."""
    for backend in ("privinf", "crypten"):
        rows = [r for r in run.rows if r.backend == backend and r.phase == "online"]
        sent = {p: sum(r.bytes_sent for r in rows if r.party == p) for p in ("client", "server")}
        received = {p: sum(r.bytes_received for r in rows if r.party == p) for p in ("client", "server")}
        assert 0 <= sent["client"] - received["server"] <= 128 and 0 <= sent["server"] - received["client"] <= 128
        assert sent["client"] > 1000


def test_totals_are_sums_and_the_schema_is_strict(run: Run, saved: Path) -> None:
    result = read(saved)
    assert result == run.result(True) and result.version == VERSION
    for total in result.totals:
        own = [r for r in result.rows if (r.backend, r.phase) == (total.backend, total.phase)]
        assert total.bytes_sent == sum(r.bytes_sent for r in own) and total.bytes_received == sum(r.bytes_received for r in own)
        assert total.rounds == sum(r.rounds for r in own if r.party == "client")
    wrong = msgspec.structs.replace(result.totals[0], bytes_sent=1)
    with pytest.raises(ConfigError, match="not the sum"):
        check(msgspec.structs.replace(result, totals=(wrong, *result.totals[1:])))
    contract = {"variant", "layers", "heads", "width", "seq", "backend", "trust", "device", "link", "layer", "op", "phase", "party"}
    contract |= {"bytes_sent", "bytes_received", "rounds", "seconds", "samples"}
    assert contract <= set(msgspec.to_builtins(result.rows[0]))


def test_errors_ratios_and_memory_are_there(run: Run) -> None:
    found = {(m.name, m.of): m.value for m in run.measures}
    assert found["worst logit error", "privinf"] < 0.05 and found["worst logit error", "crypten"] < 0.2
    assert found["online bytes, times ours", "crypten"] > 1 and found["online rounds, times ours", "crypten"] > 1
    assert all(found["peak memory", f"privinf {party}"] > 1e8 for party in ("server", "client", "dealer"))


def test_tables_and_csv(run: Run) -> None:
    result = run.result(False)
    text = markdown(result)
    assert "unfinished" in text and "attn.attention" in text
    assert len(as_csv(result).splitlines()) == len(result.rows) + 1
    assert str(Path.home()) not in encode(result).decode() and str(ROOT) not in encode(result).decode()


def test_a_network_that_does_not_lower_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent from the rows, never invented; the others are still measured."""

    def refused(variant: str, work: Path, **sizes: int) -> Network:
        raise UnsupportedOpError(f"{variant}: aten.nonsense")

    monkeypatch.setattr(scenario, "made", refused)
    found = Run("ladder")
    scenario.ladder(found, tmp_path, quick=True, seq=5, samples=1, backends=["privinf"], link=None)
    assert not found.rows
    assert {absent.what for absent in found.absent} >= {"SM+LN+G", "SM+ScFuFFN"}
    assert all("aten.nonsense" in absent.reason for absent in found.absent)


def test_micro_counts() -> None:
    found = run_case(next(case for case in cases() if case.name.startswith("linear")))
    assert (found.online_bytes, found.rounds) == (5.0, 0) and found.error is not None and found.error < 0.01


@pytest.mark.parametrize(("samples", "middle"), [([], None), ([3.0], 3.0), ([5.0, 1.0, 2.0], 2.0), ([4.0, 1.0], 2.5)])
def test_median(samples: list[float], middle: float | None) -> None:
    assert median(samples) == middle


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nosuch"], "No such command"),
        (["shipped", "--backends", "nosuch"], "no backend 'nosuch'"),
        (["shipped", "--backends", ","], "no backend was chosen"),
        (["shipped", "no/such/model"], "no model directory"),
        (["micro", "--json", "no/such/directory/x.json"], "no directory"),
        (["micro", "--samples", "0"], "--samples"),
        (["report", "no/such/result.json"], "cannot be read"),
    ],
)
def test_errors_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("change", [{"version": 99}, {"schema": "other"}])
def test_another_schema_is_refused(saved: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    fields = msgspec.json.decode(saved.read_bytes()) | change
    saved.write_bytes(msgspec.json.encode(fields))
    assert main(["report", str(saved)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_too_little_memory_is_said_before_the_start(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**6)
    with pytest.raises(ConfigError, match="GB of memory"):
        interleave(Run("test"), network, 5, ["privinf"])


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.scenarios import micro

    done: list[Any] = []

    def stop_at_second(*words: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(words)
        return run_case(*words)

    monkeypatch.setattr(micro, "run_case", stop_at_second)
    path = tmp_path / "micro.json"
    assert main(["micro", "--samples", "1", "--json", str(path)]) == 130
    result: Result = read(path)
    assert not result.complete and result.measures
    assert "kept" in capsys.readouterr().err


def test_from_the_repository_root() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and "ladder" in found.stdout
