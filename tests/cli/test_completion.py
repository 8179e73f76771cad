"""What a shell is told when it asks how a line may go on."""

from __future__ import annotations

import pytest

from privinf.cli.app import COMPLETE, main


@pytest.mark.parametrize(("words", "found"), [("privinf ga", "gateway"), ("privinf serve --allow", "--allow-logits")])
def test_verbs_and_their_options_are_completed(
    words: str, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(COMPLETE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert main([]) == 0
    assert capsys.readouterr().out.split() == [found]


def test_the_line_for_a_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(COMPLETE, "source_bash")
    assert main([]) == 0
    assert f"{COMPLETE}=complete_bash" in capsys.readouterr().out
