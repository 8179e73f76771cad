"""The harness: its schema, that sums of rows are totals are the parties' socket counters, and its errors in one line."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import benchmarks
from benchmarks import choose, machine
from benchmarks.__main__ import main
from benchmarks.backends.crypten_party import Audit
from benchmarks.backends.privinf_backend import devices_of
from benchmarks.links import kernel_link, link_of
from benchmarks.measure import Run, interleave
from benchmarks.micro import cases, run_case
from benchmarks.networks import Network
from benchmarks.output import as_csv, markdown
from benchmarks.report import BEGIN, END
from benchmarks.scenarios import ladder as scenario
from benchmarks.schema import VERSION, Result, check, encode, median, read
from benchmarks.transfers import speeds
from protocols.errors import ConfigError, UnsupportedOpError
from tests.support.waiting import PATIENCE

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
ROOT = Path(__file__).parents[2]


def test_ours_wins_over_the_package_that_crypten_installs() -> None:
    assert Path(benchmarks.__file__ or "").parent == ROOT / "benchmarks"


def test_rows_are_totals_are_the_socket_counters(run: Run) -> None:
    """Byte for byte: each party's rows, the counters of its sockets themselves, and the totals."""
    result = run.result(True)
    assert {(s.backend, s.party, s.peer) for s in result.sockets} == {
        *(("privinf", a, b) for a in ("client", "server", "dealer") for b in ("client", "server", "dealer") if a != b),
        ("crypten", "client", "server"),
        ("crypten", "server", "client"),
    }
    for socket in result.sockets:
        own = [r for r in result.rows if (r.backend, r.party, r.peer) == (socket.backend, socket.party, socket.peer)]
        assert (sum(r.bytes_sent for r in own), sum(r.bytes_received for r in own)) == (socket.bytes_sent, socket.bytes_received)
    for backend in ("privinf", "crypten"):
        both = [sum(x.bytes_sent for x in things if x.backend == backend) for things in (result.rows, result.totals, result.sockets)]
        assert len(set(both)) == 1 and both[0] > 1000


def test_a_socket_that_disagrees_is_refused(run: Run) -> None:
    result = run.result(True)
    wrong = msgspec.structs.replace(result.sockets[0], bytes_sent=result.sockets[0].bytes_sent + 1)
    with pytest.raises(ConfigError, match="has not counted the sum of its rows"):
        check(msgspec.structs.replace(result, sockets=(wrong, *result.sockets[1:])))


def test_what_explain_predicts_is_what_is_counted(run: Run) -> None:
    found = {m.name: m.value for m in run.measures if m.of == "privinf"}
    for name in ("online payload", "offline between S and C payload", "dealer's payload", "set-up payload", "online rounds"):
        assert found[name] == found[f"{name}, predicted"] > 0


def test_seconds_are_compute_wait_and_wire(run: Run) -> None:
    rows = [r for r in run.rows if r.backend == "privinf" and r.phase == "online" and r.op and r.party != "dealer"]
    assert {r.party for r in rows} == {"client", "server"}
    for row in rows:
        parts = (row.compute_seconds, row.wait_seconds, row.wire_seconds)
        assert row.seconds == pytest.approx(sum(part or 0.0 for part in parts)) and all(part is not None and part >= 0 for part in parts)
        assert row.peak_bytes is not None and row.peak_bytes > 1e8
    macs = {r.op: r.macs for r in rows if r.party == "server"}
    assert macs["lm_head.linear"] == TINY["n_embd"] * TINY["vocab_size"] and all(r.macs is None for r in rows if r.party == "client")


def test_set_up_and_early_messages_are_split_by_operator(run: Run) -> None:
    """As predicted, weight by weight at both ends, and what the client sends ahead at its own."""
    rows = [r for r in run.rows if r.backend == "privinf" and {r.party, r.peer} == {"client", "server"}]
    predicted = {(p.layer, p.op): p for p in run.predicted}
    for party in ("client", "server"):
        found = {(r.layer, r.op): r.payload for r in rows if (r.phase, r.party) == ("setup", party) and r.payload}
        assert found == {label: p.setup_bytes for label, p in predicted.items() if p.setup_bytes}
    found = {(r.layer, r.op): r.payload for r in rows if (r.phase, r.party) == ("offline", "client") and r.payload}
    assert found == {label: p.peer_offline_bytes for label, p in predicted.items() if p.peer_offline_bytes}


def test_truncations_of_crypten_are_audited(run: Run) -> None:
    found = {m.name: m.value for m in run.measures if m.of == "crypten"}
    assert found["truncations a pass"] > 1000 and 0 < found["truncation failures, expected a pass"] < 1e-3
    assert found["truncation failures a pass"] == 0


def test_both_ends_of_a_link_count_the_same(run: Run) -> None:
    """What one party's socket sent the other, the other's received, up to the last words of TLS that nobody reads.

    Over all phases: a busy receiver reads the first bytes of a phase while it is in the one before.
    """
    for backend in ("privinf", "crypten"):
        rows = [r for r in run.rows if r.backend == backend and {r.party, r.peer} == {"client", "server"}]
        sent = {p: sum(r.bytes_sent for r in rows if r.party == p) for p in ("client", "server")}
        received = {p: sum(r.bytes_received for r in rows if r.party == p) for p in ("client", "server")}
        assert 0 <= sent["client"] - received["server"] <= 128 and 0 <= sent["server"] - received["client"] <= 128
        assert sent["client"] > 1000


def test_totals_are_sums_and_the_schema_is_strict(run: Run, saved: Path) -> None:
    result = read(saved)
    again = msgspec.structs.replace(run.result(True), took_s=result.took_s)  # a run that is asked later has taken longer
    assert msgspec.to_builtins(result) == msgspec.to_builtins(again) and result.version == VERSION
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
    scenario.ladder(found, tmp_path, quick=True, seq=5, samples=1, backends=["privinf"])
    assert not found.rows
    assert {absent.what for absent in found.absent} >= {"SM+LN+G", "SM+ScFuFFN"}
    assert all("aten.nonsense" in absent.reason for absent in found.absent)


def test_micro_counts() -> None:
    found = run_case(next(case for case in cases() if case.name.startswith("linear")))
    assert (found.online_bytes, found.rounds) == (5.0, 0) and found.error is not None and found.error < 0.01


def test_transfers_are_timed_with_their_bytes() -> None:
    found = {speed.name: speed for speed in speeds(70, 0)}
    assert found["IKNP"].bytes == 16 * found["IKNP"].transfers
    assert found["silent"].bytes < found["silent"].transfers / 5
    assert {speed.elements for speed in found.values()} == {0, 70}
    assert all(speed.sender_s >= 0 and speed.receiver_s >= 0 and speed.bytes > 0 for speed in found.values())


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
        (["compare", "no/such/a.json", "no/such/b.json"], "cannot be read"),
        (["ladder", "--quick", "--networks", "SM+X"], "not on the ladder"),
        (["ladder", "--quick", "--device", "clinet=cuda"], "no party 'clinet'"),
        (["ladder", "--quick", "--device", "cuda:99"], "'cuda:99' is not here"),
        (["links", "--links", "loopback,avian"], "cannot read the link"),
        (["generate", "--lengths", "long"], "no list of whole numbers"),
        (["all", "--only", "nosuch"], "no stage 'nosuch'"),
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


def test_too_little_memory_is_said_before_the_start(
    network: Network, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**6)
    monkeypatch.setattr(scenario, "made", None)  # not even a network is made
    assert main(["ladder"]) == 2
    assert "GB of memory" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="GB of memory"):
        interleave(Run("test"), network, 5, ["privinf"])


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.scenarios import micro

    done: list[Any] = []
    monkeypatch.setattr(micro, "cases", lambda: cases()[:2])

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


def test_the_report_is_whole(saved: Path, tmp_path: Path) -> None:
    """Markdown with its pictures, a page without outside assets, README's block, and everything measured in the page's tables."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    page, text = tmp_path / "report.html", tmp_path / "figures.md"
    assert main(["report", str(saved), "--out", str(text), "--html", str(page), "--readme", str(readme)]) == 0
    html = page.read_text()
    assert "data:image/png;base64," in html and "attn.attention" in html
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|<script", html)
    assert (tmp_path / "figures" / "waterfall.png").read_bytes().startswith(b"\x89PNG") and "figures/waterfall.png" in text.read_text()
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines and any("CrypTen" in line for line in lines)
    assert all(alt for alt in re.findall(r"!\[(.*?)\]\(", text.read_text())) and not re.search(r'<img alt=""', html)


def test_a_readme_without_its_marks_is_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert main(["report", str(saved), "--readme", str(readme)]) == 2
    assert "has no place for figures" in capsys.readouterr().err and readme.read_text() == "nothing"


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "bytes_sent" in msgspec.json.decode(capsys.readouterr().out)["$defs"]["Row"]["properties"]


def test_the_latency_model_is_in_half_round_trips() -> None:
    class Fake:
        rounds, bytes_sent, bytes_received = 10, 1_000_000, 500_000

    assert choose.latency([Fake()] * 2, 100.0, 8.0, 0.5) == pytest.approx(20 * 0.05 + 2.0 + 0.5)  # type: ignore[list-item]


def test_links_and_devices_by_name() -> None:
    assert (link_of(None).emulated, link_of("loopback").rtt_ms, link_of("4g").rtt_ms, link_of("20ms:100").mbit_s) == (False, None, 50, 100)
    assert devices_of("cuda") == {"client": "cuda", "server": "cuda", "dealer": "cuda"} and devices_of("server=cuda") == {"server": "cuda"}


def test_the_kernel_shapes_a_loopback_of_its_own() -> None:
    """What processes send within takes the time of the rate; without the rights for it, one line."""
    code = "import socket, time; a, b = socket.create_server(('127.0.0.1', 0)), None; print(a.getsockname()[0])"
    before = os.readlink("/proc/thread-self/ns/net") if os.path.exists("/proc/thread-self/ns/net") else ""
    try:
        with kernel_link(10.0, 50.0) as link:
            assert os.readlink("/proc/thread-self/ns/net") != before and link.mbit_s == 50 and not link.emulated
            shaped = subprocess.run(["tc", "qdisc", "show", "dev", "lo"], capture_output=True, text=True).stdout
            assert "50Mbit" in shaped and "127.0.0.1" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    except (ConfigError, OSError) as error:
        pytest.skip(str(error))
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_an_audit_sees_a_truncation_that_failed(tmp_path: Path) -> None:
    """Shares that wrap lose 2^64 / scale; the audit, not CrypTen, says so."""

    class Tensor:
        def __init__(self, share: torch.Tensor) -> None:
            self.share = share

        def div_(self, y: int) -> Any:
            self.share = self.share.div(y, rounding_mode="trunc")
            return self

    good, bad = torch.tensor([[5 << 16, 7 << 16], [1 << 40, -(1 << 40)]]), torch.tensor([[2**63 - 1, 3], [2**63 - 1, 4]])
    kinds = [type(f"Of{rank}", (Tensor,), {}) for rank in range(2)]
    audits: list[Audit] = []

    def party(rank: int) -> None:
        audit = Audit(rank, str(tmp_path / "audit"))
        audits.append(audit)
        audit.run(kinds[rank], lambda: [kinds[rank](x[rank].clone()).div_(1 << 16) for x in (good, bad)])

    threads = [threading.Thread(target=party, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    found = next(audit.found for audit in audits if audit.rank == 1)
    assert (found["truncations"], found["truncation failures"]) == (4, 1)


def test_spu_runs_the_same_graph_where_it_is_installed(network: Network, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise one line names the extra."""
    if importlib.util.find_spec("spu") is None:
        assert main(["shipped", "--backends", "privinf,spu-semi2k"]) == 2
        assert "pip install '.[spu]'" in capsys.readouterr().err
        return
    found = Run("test")
    interleave(found, network, 5, ["privinf", "spu-semi2k"], samples=1, errors=1)
    check(found.result(True))
    values = {(m.name, m.of): m.value for m in found.measures}
    assert values["worst logit error", "spu-semi2k"] < 0.05 and values["online bytes, times ours", "spu-semi2k"] > 1


def test_from_the_repository_root() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert found.returncode == 0 and "ladder" in found.stdout
