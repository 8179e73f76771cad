"""A verb of one's own, as CONTRIBUTING says: a function of its name under `expand`, and a line in `VERBS`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest

from privinf.cli import common
from privinf.cli.app import main
from privinf.cli.expand import expand
from privinf.cli.gateway import Callers
from privinf.cli.options import PromptText, make_options
from privinf.cli.verbs import VERBS
from privinf.session.options import Admission, Options, Runtime
from privinf.setting import Setting, settings_of


@dataclass(frozen=True)
class Greeting:
    """Options of this verb alone."""

    whom: Annotated[str, Setting("Who is greeted.", "WHO")]
    times: Annotated[int, Setting("How often.", "N", least=1, most=3)] = 1
    loud: Annotated[bool, Setting("In capitals.")] = False
    polite: Annotated[bool, Setting("With a please.", name="please")] = True


FEW = Admission(sessions=7)


@expand(without=("device", "client_sessions"))
def greet(
    *,
    greeting: Greeting,
    tone: Annotated[str, Setting("How it sounds.", choices=("warm", "cold"))] = "warm",
    admission: Admission = FEW,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Greet someone.

    Example: privinf greet --whom you
    """
    options = make_options(runtime, admission)
    common.write_json({**vars(greeting), "tone": tone, "options": [options.sessions, options.timeout, str(options.cache), options.device]})


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("privinf.cli.greet")
    module.greet = greet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VERBS, "greet", "Greet someone.")


def test_fields_are_options_and_come_back_filled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["greet", "--whom", "you"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "whom": "you",
        "times": 1,
        "loud": False,
        "polite": True,
        "tone": "warm",
        "options": [7, 60.0, str(Options().cache), "cpu"],
    }
    given = ["--times", "2", "--loud", "--no-please", "--tone", "cold", "--sessions", "9", "--timeout", "5", "--cache", str(tmp_path)]
    assert main(["greet", "--whom", "you", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"whom": "you", "times": 2, "loud": True, "polite": False, "tone": "cold", "options": [9, 5.0, str(tmp_path), "cpu"]}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "missing option '--whom'"),
        (["--whom", "you", "--times", "4"], "less than or equal to 3"),
        (["--whom", "you", "--tone", "loud"], "--tone"),
        (["--whom", "you", "--device", "cpu"], "no such option: --device"),
        (["--whom", "you", "--timeout", "0"], "--timeout 0 is no time to wait"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greet", *words]) == 2
    assert complaint in capsys.readouterr().err.lower()


def test_help_and_configuration_know_it(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["greet", "--help"]) == 0
    text = capsys.readouterr().out
    places = [
        text.index(word) for word in ("--whom", "--times", "--please", "--tone", "--sessions", "--link", "--cache", "--json", "--config")
    ]
    assert places == sorted(places) and "Who is greeted." in text and "[default: 7]" in text
    file = tmp_path / "privinf.yaml"
    file.write_text("greet:\n  whom: you\n  please: false\n")
    assert main(["greet", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["polite"] is False
    assert main(["config", "show", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["verbs"]["greet"]
    assert shown["whom"] == {"value": "you", "from": "file"} and shown["cache"] == {"value": None, "from": "default"}
    assert main(["--help"]) == 0 and "Greet someone." in capsys.readouterr().out


def test_all_of_options_can_be_set() -> None:
    """Each field says what it is, so that a verb may have it."""
    assert set(settings_of(Options)) == {*vars(Options())}


def test_secrets_among_options_are_not_shown() -> None:
    secret = "sk-tell-nobody"
    assert secret not in repr(Callers(api_key=secret)) + repr(PromptText(prompt=secret)) + repr(PromptText(prompt_ids=secret))
