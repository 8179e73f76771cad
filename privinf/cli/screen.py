"""What a person sees of a run: a status line and a summary on a terminal, tokens as they come; without one, the tokens alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, Literal

from privinf.cli import common
from privinf.session.waiting import line_of, once_for_each_reason

FIRST_S, NEXT_S = 2.0, 10.0
"""Until the first line of those for a file or a pipe, and between the others."""


class Screen:
    """Writes tokens to stdout and everything else to stderr, and but for why a peer cannot be reached only if that is a terminal.

    With `plain` what is going on is said there too, in a line now and then, where it takes longer than FIRST_S. `quiet`: nothing is said.
    """

    def __init__(self, *, quiet: bool, plain: bool = False) -> None:
        from rich.console import Console

        self.quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._shows = self._console.is_terminal and not quiet
        self._status: Any = None
        self._doing, self._over = "", threading.Event()
        self._teller = (
            threading.Thread(target=self._tell, name="privinf-screen", daemon=True) if plain and not self._shows and not quiet else None
        )
        self._writing = False
        self._plain = once_for_each_reason(lambda line: print(line, file=sys.stderr, flush=True))

    def __enter__(self) -> Screen:
        if self._teller is not None:
            self._teller.start()
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.stop()
        self._over.set()
        if self._teller is not None:
            self._teller.join()
        return False

    def _tell(self) -> None:
        began, pause = time.monotonic(), FIRST_S
        while not self._over.wait(pause):
            print(f"{self._doing}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            pause = NEXT_S

    def say(self, text: str) -> None:
        """What is going on now."""
        self._doing = text
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

    def write_tokens(self, tokens: Iterable[common.TokenLike], prompt: common.PromptOption) -> None:
        """The new text; on a terminal it follows the prompt."""
        common.write_tokens(self._after_prompt(tokens, prompt), quiet=self.quiet)

    def write_replies(self, placed: Iterable[tuple[int, common.TokenLike]], prompts: common.PromptOptions) -> None:
        """The new texts of several prompts, once all are there, in the order of the prompts; what came before an error, too."""
        texts: list[list[common.TokenLike]] = [[] for _ in range(len(prompts))]
        try:
            for which, token in placed:
                texts[which].append(token)
        finally:
            self.stop()
            for text in texts:
                common.write_tokens(text, quiet=self.quiet)

    def _after_prompt(self, tokens: Iterable[common.TokenLike], prompt: common.PromptOption) -> Iterable[common.TokenLike]:
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
        if "replies" in result:
            tokens = sum(len(reply.get("tokens", ())) for reply in result["replies"])
            self._console.print(f"{len(result['replies'])} prompts, {tokens} new tokens", style="dim", markup=False)
            return
        timing, traffic, model = result["timing"], result["traffic"], result["model"]
        later = timing["per_token_s"][1:]
        pace = f", then {sum(later) / len(later):.2f} s a token" if later else ""
        lines = [
            f"{result['prompt_tokens']} prompt tokens, {len(result['tokens'])} new; {model['variant']}, {model['layers']} layers, "
            f"trust: {result['trust_model']}",
            f"set-up {timing['setup_s']:.2f} s, offline {timing['offline_s']:.2f} s, first token {timing['first_token_s']:.2f} s{pace}",
        ]
        for phase in ("setup", "offline", "online"):
            part = traffic[phase]
            moved = common.human_bytes(part["sent"] + part["received"])
            lines.append(f"{phase}: {moved}, {part['rounds']} rounds")
        lines.append(common.tokenizer_line(model["tokenizer"]))
        self._console.print("\n".join(lines), style="dim", markup=False)
