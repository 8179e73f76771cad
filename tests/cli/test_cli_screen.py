"""What a person sees: help, tables and pictures that cut nothing, no control code where nobody looks, and nothing of theirs overwritten."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import privinf
from privinf.cli import screen
from privinf.cli.common import human_bytes, human_count
from privinf.cli.table import Column, show_table
from privinf.lowering.explain import explain
from privinf.session.options import Options
from privinf.transport.keys import load_credentials
from privinf.transport.listener import dial
from protocols.errors import ConfigError, HandshakeError, PeerUnreachableError
from tests.support import trio
from tests.support.command import COMMANDS, Call, assert_one_line
from tests.support.command import call as call

__all__ = ["call"]
GROUPS = [["keys"], ["config"], ["cache"]]


# ---- help


@pytest.mark.parametrize("words", [[], *GROUPS, *COMMANDS], ids=lambda words: " ".join(words) or "privinf")
def test_help_fits_a_terminal_and_says_nothing_of_types(call: Call, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = call(*words, "--help")
    assert done.code == 0 and "Example: privinf" in done.out
    assert "<bool>" not in done.out and "…" not in done.out and "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


# ---- tables


class Deep(nn.Module):
    """A chain of modules with long names."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.the_inner_network_of_somebody_else = Deep(depth - 1) if depth else nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.the_inner_network_of_somebody_else(x)
        return found


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deep") / "model"
    privinf.lower(Deep(3), torch.randn(2, 4)).save(directory)
    return directory


@pytest.mark.parametrize("columns", [None, "80", "60"])
@pytest.mark.parametrize("which", ["checkpoint", "long names"])
def test_explain_cuts_no_figure(
    call: Call, monkeypatch: pytest.MonkeyPatch, deep: Path, tmp_path: Path, columns: str | None, which: str
) -> None:
    model = trio.lowered_directory() if which == "checkpoint" else deep
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    done = call("explain", model, "--seq", 8, "--cache", tmp_path)
    assert done.code == 0 and "…" not in done.out and "\x1b" not in done.out
    if columns is not None:
        assert max(map(len, done.out.splitlines())) <= int(columns)
    found = explain(privinf.load(model), 8)
    for op in [*found["ops"], found["total"]]:
        for key in ("online_bytes", "dealer_bytes", "peer_offline_bytes", "setup_bytes"):
            assert not op[key] or re.search(rf"(?<!\S){re.escape(human_bytes(op[key]))}(?!\S)", done.out), (op, key)
        assert not op["macs"] or human_count(op["macs"]) in done.out
    for wire in found["wires"]:
        assert wire["range"] is None or re.search(rf"(?<!\S){wire['range']:.4g}(?!\S)", done.out), wire


def test_a_narrow_table_is_several_and_keeps_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    names = Column("name", ["a.very.long.name.of.a.layer " + "x" * 70, "b"], words=True)
    figures = [Column(f"title {n}", [f"{10 ** (9 + n)}", "1"]) for n in range(5)]
    show_table(Console(width=40), names, [*figures, Column("words", ["some of several lines", ""], words=True)])
    out = capsys.readouterr().out
    assert all(re.search(rf"(?<!\d){10 ** (9 + n)}(?!\d)", out) for n in range(5)) and max(map(len, out.splitlines())) <= 40
    assert out.count("name") >= 2 and out.replace("\n", "").replace(" ", "").count("x") == 70 * out.count("a.very")


def test_counts_for_people() -> None:
    assert [human_count(n) for n in (0, 999, 1000, 100_663_296, 2.5e12)] == ["0", "999", "1.0 k", "100.7 M", "2.50 T"]
    assert human_bytes(3e12) == "3.00 TB"


# ---- nothing overwritten


def test_convert_replaces_a_lowered_model_when_told_to_and_never_anything_else(call: Call, tmp_path: Path) -> None:
    checkpoint, target = trio.checkpoint(), tmp_path / "model"
    assert call("convert", checkpoint, "-o", target).code == 0
    first = privinf.load(target).id
    done = call("convert", checkpoint, "-o", target)
    assert done.code == 2 and "--force" in done.err and privinf.load(target).id == first
    assert_one_line(done.err)
    assert call("convert", checkpoint, "-o", target, "--force").code == 0
    second = privinf.load(target)
    assert second.id != first
    (target / "notes.txt").write_text("mine")
    for place in (target, checkpoint, target / "notes.txt"):
        done = call("convert", checkpoint, "-o", place, "--force")
        assert done.code == 2 and "something else" in done.err
        assert_one_line(done.err)
    with pytest.raises(ConfigError, match="something else"):
        second.save(target)
    assert (target / "notes.txt").read_text() == "mine"


# ---- a peer that cannot be reached


def generate_from(place: str, keys: Path, *more: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    words = ["generate", "--server", place, "--dealer", place, "--keys", keys, "--prompt", "x", *more]
    return subprocess.Popen([sys.executable, "-m", "privinf", *map(str, words)], stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.fixture
def closed() -> Iterator[str]:
    """An address that is ours and where nobody listens."""
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{ours.getsockname()[1]}"


def test_why_a_peer_cannot_be_reached_is_said_at_once(closed: str) -> None:
    process = generate_from(closed, trio.keys(), "--connect-timeout", "40")
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == f"connection refused at {closed}, trying again, 40 s left\n"
    finally:
        process.kill()
        process.communicate()


def test_a_peer_that_cannot_be_reached_is_given_up(closed: str) -> None:
    plain, silent = (generate_from(closed, trio.keys(), "--connect-timeout", "1", *more) for more in ([], ["--json"]))
    out, err = plain.communicate(timeout=100)
    told, line = err.splitlines(keepends=True)
    assert (plain.returncode, out, told) == (3, "", f"connection refused at {closed}, trying again, 1 s left\n")
    assert_one_line(line)
    assert "could not connect within 1 s: connection refused" in line
    assert silent.communicate(timeout=100) == ("", line) and silent.returncode == 3


def test_a_terminal_counts_down(closed: str) -> None:
    ours, theirs = pty.openpty()
    with generate_from(closed, trio.keys(), "--connect-timeout", "6", stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(ours, 1 << 16):
                seen += data
        os.close(ours)
        assert process.wait(100) == 3
    left = [int(seconds) for seconds in re.findall(rb"trying again, (\d+) s left", seen)]
    assert left == sorted(left, reverse=True) and left[0] <= 6 and len(set(left)) >= 2  # a busy machine may skip some


def test_defaults_of_dialling() -> None:
    assert (Options().connect_s, Options(timeout=4.0).connect_s, Options(connect_timeout=30.0).connect_s) == (10.0, 4.0, 30.0)


def test_a_name_without_an_address_and_a_port_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, said = load_credentials(str(trio.keys()), "client"), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(HandshakeError, match="did not finish the TLS handshake in time"):
        place = f"127.0.0.1:{mute.getsockname()[1]}"
        dial(place, ours, "server", handshake_s=1.5, waiting=lambda reason, left: said.append(reason))
    assert said == [f"no answer yet from {place}"]

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(PeerUnreachableError, match=r"within 0\.1 s: the name nowhere cannot be resolved, name or service not known"):
        dial("nowhere:1", ours, "server", connect_s=0.1)


# ---- what takes long


@pytest.mark.parametrize("verb", ["convert", "analyze", "compare"])
def test_what_takes_long_says_what_it_does(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str) -> None:
    monkeypatch.setattr(screen, "FIRST_S", 0.01)
    monkeypatch.setattr(screen, "NEXT_S", 0.01)
    words: list[object] = {
        "convert": ["-o", tmp_path / "model"],
        "analyze": ["-o", tmp_path / "found", "--windows", "2", "--length", "8", "--prompts", "1", "--prompt-length", "8"],
        "compare": ["--prompt-ids", "1,2,3", "--cache", tmp_path / "cache"],
    }[verb]
    model = trio.checkpoint(texts=False)
    plain = call(verb, model, *words)
    assert plain.code == 0, plain.err
    told = [line for line in plain.err.splitlines() if re.fullmatch(r"[ -~]+, \d+ s", line)]
    assert told and "\x1b" not in plain.err + plain.out
    begins = {"convert": ("lowering",), "analyze": ("entropy", "ablation", "tracing", "plots"), "compare": ("one private pass",)}[verb]
    assert any(line.startswith(begins) for line in told)
    silent = call(verb, model, *words, *(["--force"] if verb == "convert" else []), "--json")
    assert silent.code == 0 and silent.err == ""
