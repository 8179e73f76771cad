"""What a person sees of a run: a status line and a summary on a terminal, tokens as they come; without one, the tokens alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Literal

from privinf.cli import common
from privinf.party.waiting import line_of, once_for_each_reason


class Screen:
    """Writes tokens to stdout and everything else to stderr, and but for why a peer cannot be reached only if that is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console

        self.quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._shows = self._console.is_terminal and not quiet
        self._status: Any = None
        self._writing = False
        self._plain = once_for_each_reason(lambda line: print(line, file=sys.stderr, flush=True))

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.stop()
        return False

    def say(self, text: str) -> None:
        """What is going on now."""
        if not self._shows:
            return
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def progress(self, phase: str, share: float) -> None:
        """How much of a phase is done. Once text is on the screen it stays undisturbed."""
        if not self._writing:
            self.say(f"{phase} {100 * share:3.0f} %")

    def waiting(self, reason: str, left: float) -> None:
        """Why a peer cannot be reached, with a countdown on a terminal, and elsewhere once for each reason."""
        if self._shows:
            self.say(line_of(reason, left))
        elif not self.quiet:
            self._plain(reason, left)

    def stop(self) -> None:
        """Ends the status line."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def write_tokens(self, tokens: Iterable[common.TokenLike], prompt: common.Prompt) -> None:
        """The new text; on a terminal it follows the prompt."""
        common.write_tokens(self._after_prompt(tokens, prompt), quiet=self.quiet)

    def _after_prompt(self, tokens: Iterable[common.TokenLike], prompt: common.Prompt) -> Iterable[common.TokenLike]:
        first = True
        for token in tokens:
            self._writing = True
            if first and self._shows:
                self.stop()
                if prompt.text is not None and sys.stdout.isatty():
                    self._console.print(prompt.text, style="dim", end="", markup=False, soft_wrap=True)
            first = False
            yield token
        self.stop()

    def summary(self, result: dict[str, Any] | None) -> None:
        """Time and traffic by phase, for a person."""
        if not self._shows or result is None:
            return
        timing, traffic, model = result["timing"], result["traffic"], result["model"]
        later = timing["per_token_s"][1:]
        pace = f", then {sum(later) / len(later):.2f} s a token" if later else ""
        lines = [
            f"{result['prompt_tokens']} prompt tokens, {len(result['tokens'])} new; {model['variant']}, {model['layers']} layers, "
            f"trust: {result['trust']}",
            f"set-up {timing['setup_s']:.2f} s, offline {timing['offline_s']:.2f} s, first token {timing['first_token_s']:.2f} s{pace}",
        ]
        for phase in ("setup", "offline", "online"):
            part = traffic[phase]
            moved = common.human_bytes(part["sent"] + part["received"])
            lines.append(f"{phase}: {moved}, {part['rounds']} rounds")
        lines.append(common.tokenizer_line(model["tokenizer"]))
        self._console.print("\n".join(lines), style="dim", markup=False)
