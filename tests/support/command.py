"""The command line in tests: a verb in this process, or as a user types it, and what its errors look like."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from privinf.cli import app as cli
from privinf.cli import screen
from privinf.cli.verbs import VERBS
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SUBCOMMANDS = {"keys": ("init", "show", "renew"), "config": ("show",), "cache": ("ls", "rm")}
COMMANDS = [[verb, *sub] for verb in VERBS for sub in [[name] for name in SUBCOMMANDS.get(verb, ())] or [[]]]


class Done(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Done]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Runs the command line in this process, and leaves the process as it was."""
    monkeypatch.setattr(cli, "install", lambda: None)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("PRIVINF_DEBUG", "")  # what --debug sets is undone
    monkeypatch.setattr(screen, "FIRST_S", PATIENCE)  # a slow machine makes nothing worth telling
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*words: object) -> Done:
        capfd.readouterr()
        return Done(cli.main([str(word) for word in words]), *capfd.readouterr())

    with warnings.catch_warnings():
        yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def start(*words: object, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "privinf", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def finish(process: subprocess.Popen[str], limit: float = 200) -> Done:
    """How it ended; its stderr without the lines that tell how far it is, which come with time."""
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        process.kill()
    return Done(process.returncode, out, re.sub(r"^.*(, \d+ s| %, .*)\n", "", err, flags=re.MULTILINE))


def assert_one_line(text: str) -> None:
    assert text.startswith("privinf: ") and text.endswith("\n") and text.count("\n") == 1, text
