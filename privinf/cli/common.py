"""What the verbs have in common: how a prompt is read, and how results are written."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TextIO

import typer

from protocols.errors import ConfigError

MAX_PROMPT_BYTES = 1 << 20
KEY_VARIABLE = "PRIVINF_API_KEY"

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]


class TokenLike(Protocol):
    """A new token: its id and, where there is a tokenizer, its text."""

    @property
    def id(self) -> int:
        """In the model's vocabulary."""

    @property
    def text(self) -> str | None:
        """What it adds to the reply; None without a tokenizer."""


@dataclass(frozen=True)
class PromptOption:
    """Exactly one of the two; not shown, for a prompt is a secret."""

    text: str | None
    ids: list[int] | None

    def __repr__(self) -> str:
        return "Prompt(hidden)"


@dataclass(frozen=True)
class PromptOptions:
    """Several prompts, in one of the two ways; not shown."""

    texts: list[str] | None
    ids: list[list[int]] | None

    def __len__(self) -> int:
        return len(self.texts or self.ids or ())

    @property
    def given(self) -> dict[str, Any]:
        """As arguments of `generate`."""
        return {"prompt": self.texts, "ids": self.ids}

    def __repr__(self) -> str:
        return "Prompts(hidden)"


def read_prompt(text: str | None, file: Path | None, ids: str | None) -> PromptOption:
    """The prompt from whichever option was given; ConfigError unless it is exactly one, and not empty."""
    only_one(text, file, ids)
    if ids is not None:
        return PromptOption(None, read_ids(ids, "--prompt-ids"))
    if file is not None:
        text = _read(file)
    if not text:
        raise ConfigError("the prompt is empty", remedy="give at least one token")
    return PromptOption(text, None)


def only_one(text: object, file: object, ids: object) -> None:
    """ConfigError unless exactly one of the options was given."""
    given = [name for name, value in (("--prompt", text), ("--prompt-file", file), ("--prompt-ids", ids)) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            "no prompt was given" if not given else f"{' and '.join(given)} were given",
            remedy="give one of --prompt, --prompt-file, --prompt-ids",
        )


def read_ids(text: str, option: str) -> list[int]:
    """Token ids; ConfigError names the option."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise ConfigError(f"cannot read {option}", remedy="give token ids from 0 on, separated by commas, for example 1,2,3")
    return [int(word) for word in words]


def _read(path: Path) -> str:
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise ConfigError(f"{path}: longer than {MAX_PROMPT_BYTES} bytes, which is no prompt")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="give --prompt-file a text file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text", remedy="give --prompt-file a text file") from None


def write_tokens(tokens: Iterable[TokenLike], *, quiet: bool) -> None:
    """Writes each token as it arrives, flushed: its text, or its id where there is no tokenizer."""
    separator, written = "", False
    try:
        for token in tokens:
            if quiet:
                continue
            written = True
            if token.text is None:
                sys.stdout.write(f"{separator}{token.id}")
                separator = " "
            else:
                sys.stdout.write(token.text)
            sys.stdout.flush()
    except BaseException:
        if written and sys.stderr.isatty():
            sys.stderr.write("\n")  # what is said of the failure starts a line of its own
        raise
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()


def write_json(document: Any, out: TextIO | None = None) -> None:
    """One document, at the end, when nothing can fail any more; without `out` to standard output."""
    out = out or sys.stdout
    out.write(json.dumps(document, ensure_ascii=False) + "\n")
    out.flush()


def tokenizer_line(digest: str | None) -> str:
    """What a person compares, and gives to --expect-tokenizer."""
    return f"tokenizer: {'none' if digest is None else f'sha256 {digest}'}"


def human_bytes(count: float) -> str:
    """12.3 MB and the like, in powers of ten."""
    return _human(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """12.3 M and the like."""
    return _human(count, ("", "k", "M", "G", "T"))


def _human(count: float, units: tuple[str, ...]) -> str:
    step = 0
    while count >= 1000 and step + 1 < len(units):
        count, step = count / 1000, step + 1
    digits = 0 if step == 0 else 1 if step < 3 else 2
    return f"{count:.{digits}f} {units[step]}".rstrip()


def need(name: str) -> None:
    """ModuleNotFoundError where a library is not installed that a verb takes only later."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
