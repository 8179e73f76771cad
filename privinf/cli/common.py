"""What the verbs have in common: their options, the prompt, and how results are written."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from protocols.errors import ConfigError

MAX_PROMPT_BYTES = 1 << 20
TIMEOUT_S, CONNECT_S = 60.0, 10.0
DRAIN_S = 3.0  # with what follows it, a party ends within the 10 seconds that it has
NEW_TOKENS, LONGEST = 32, 1 << 20
KEY_VARIABLE = "PRIVINF_API_KEY"

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A lowered directory, or a checkpoint directory, which is lowered on the way.")
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory with config.json and model.safetensors.")]
PromptText = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.")]
PromptFile = Annotated[Path | None, typer.Option("--prompt-file", metavar="F", help="The prompt, from a file; - for standard input.")]
PromptIds = Annotated[str | None, typer.Option("--prompt-ids", metavar="1,2,3", help="The prompt as token ids; no tokenizer is needed.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, max=LONGEST, help="The most tokens to generate.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")]
Logits = Annotated[bool, typer.Option("--logits", help="Ask for rounded logits too, which the server must allow.")]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0: the best token, always; above: chosen by the client from logits.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Choose among the K best tokens; 0: among all.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Choose among the best tokens that have the probability P together.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Names the random numbers of the choice; default: fresh ones.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the reply before this text; may be given several times.")
]
StopIds = Annotated[str | None, typer.Option("--stop-ids", metavar="1,2,3", help="End the reply at these tokens too.")]
Chunk = Annotated[
    int, typer.Option("--chunk", metavar="N", min=0, help="Take in the prompt N tokens at a time, for less memory; 0: all at once.")
]
PadPrompt = Annotated[
    int, typer.Option("--pad-prompt", metavar="N", min=0, help="Pad the prompt in front to a multiple of N tokens, to hide its length.")
]
PadReply = Annotated[
    int, typer.Option("--pad-reply", metavar="N", min=0, help="Pad the reply to a multiple of N tokens, to hide its length.")
]
Retry = Annotated[
    int, typer.Option("--retry", metavar="N", min=0, help="Where a connection breaks, go on in a fresh session, N times at most.")
]
Listen = Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="The address to listen on; port 0 takes any free one.")]
ServerAddress = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")]
DealerAddress = Annotated[str, typer.Option("--dealer", metavar="HOST:PORT", help="Where the dealer listens.")]
Keys = Annotated[Path, typer.Option("--keys", metavar="DIR", help="What `privinf keys init` made, or this role's bundle of it.")]
LinkName = Annotated[
    str | None, typer.Option("--link", metavar="LINK", help="Emulate a link: lan, wan or RTTms:MBITS, for example 20ms:100.")
]
ExpectTokenizer = Annotated[
    str | None, typer.Option("--expect-tokenizer", metavar="SHA256", help="Refuse any tokenizer but the one with this digest.")
]
TokenizerFile = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json to use in place of the server's.")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where this party computes.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="S", help="The longest wait for a peer, in seconds.")]
ConnectTimeout = Annotated[
    float, typer.Option("--connect-timeout", metavar="S", help="How long to try to reach a peer; at most --timeout.")
]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="What is kept between runs; default: the user's cache directory.")
]
Sessions = Annotated[int, typer.Option("--sessions", metavar="N", min=1, help="Sessions at a time; the next is told to come again later.")]
ClientSessions = Annotated[
    int | None,
    typer.Option(
        "--client-sessions", metavar="N", min=0, help="Of them, of one client's certificate; 0: no limit of its own; default: half."
    ),
]
Idle = Annotated[float, typer.Option("--idle", metavar="S", help="How long a session may lie unused, seconds.")]
Drain = Annotated[
    float, typer.Option("--drain", metavar="S", min=0.0, help="After a signal, how long sessions may go on; a second one ends them.")
]
Metrics = Annotated[str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Answer Prometheus there, at /metrics.")]
LogLevel = Annotated[
    Literal["info", "warning"], typer.Option("--log", help="Log each session once it is over, without content, or only what is wrong.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]


class TokenLike(Protocol):
    """A new token: its id and, where there is a tokenizer, its text."""

    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str | None: ...


@dataclass(frozen=True)
class PromptOption:
    """Exactly one of the two; not shown, for a prompt is a secret."""

    text: str | None
    ids: list[int] | None

    def __repr__(self) -> str:
        return "Prompt(hidden)"


def read_prompt(text: str | None, file: Path | None, ids: str | None) -> PromptOption:
    """The prompt from whichever option was given; ConfigError unless it is exactly one, and not empty."""
    given = [name for name, value in (("--prompt", text), ("--prompt-file", file), ("--prompt-ids", ids)) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            "no prompt was given" if not given else f"{' and '.join(given)} were given",
            remedy="give one of --prompt, --prompt-file, --prompt-ids",
        )
    if ids is not None:
        return PromptOption(None, read_ids(ids, "--prompt-ids"))
    if file is not None:
        text = _read(file)
    if not text:
        raise ConfigError("the prompt is empty", remedy="give at least one token")
    return PromptOption(text, None)


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


def log_from(level: str) -> None:
    """Shows what the parties log from this level on; with --debug all is shown anyway."""
    if logging.getLogger().level > logging.DEBUG:
        logging.getLogger("privinf").setLevel(level.upper())


def make_sampling(temperature: float, top_k: int, top_p: float, seed: int | None, stop: list[str] | None, stop_ids: str | None) -> Any:
    """The choice of tokens; ConfigError if an option of it would have no effect."""
    from privinf.client.sampling import Sampling

    if temperature == 0 and (top_k or top_p != 1 or seed is not None):
        raise ConfigError("--top-k, --top-p and --seed choose among several tokens", remedy="give a --temperature above 0 too")
    ends = () if stop_ids is None else tuple(read_ids(stop_ids, "--stop-ids"))
    return Sampling(temperature, top_k, top_p, seed, tuple(stop or ()), ends)


def check_times(timeout: float, connect_timeout: float = CONNECT_S) -> float:
    """How long a peer is dialled; ConfigError unless both are times to wait."""
    for name, value in (("--timeout", timeout), ("--connect-timeout", connect_timeout)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} {value:g} is no time to wait", remedy="give seconds above 0")
    return min(timeout, connect_timeout)


def make_options(
    *,
    timeout: float = TIMEOUT_S,
    connect_timeout: float = CONNECT_S,
    link: str | None = None,
    device: str = "cpu",
    cache: Path | None = None,
    **others: Any,
) -> Any:
    """The runtime's `Options`, checked here so that a slip is named before anything starts."""
    check_times(timeout, connect_timeout)
    if link is not None:
        from privinf.transport.shaper import parse_link

        parse_link(link)
    from privinf.session.options import Options

    kept: dict[str, Any] = {"cache": cache} if cache is not None else {}
    return Options(timeout=timeout, connect_timeout=connect_timeout, link=link, device=device, **kept, **others)


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


def write_json(document: Any) -> None:
    """One document, at the end, when nothing can fail any more."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()


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
