"""`privinf batch`: a file of prompts in, a file of replies out."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Choice, Embedding, ExpectTrust, make_options
from privinf.session.options import LONGEST, MAX_NEW_TOKENS, Lengths, Pins, Runtime
from privinf.setting import Setting
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from privinf.jobs.batch import Progress

FAILED = 4


@dataclass(frozen=True)
class Whom:
    """Whom it asks: a server elsewhere, and its dealer if it has one, or parties on this machine."""

    server: Annotated[str | None, Setting("Where the server listens.", "HOST:PORT")] = None
    dealer: Annotated[str | None, Setting("Where the dealer listens, if the server has one.", "HOST:PORT")] = None
    keys: Annotated[Path | None, Setting("What `privinf keys init` made, or the client's bundle.", "DIR")] = None
    local: Annotated[Path | None, Setting("Start the other parties here too, with this model.", "MODEL")] = None
    trust: ExpectTrust = None
    embedding: Embedding = None


@dataclass(frozen=True)
class Work:
    """How the job is done."""

    sessions: Annotated[int, Setting("Prompts that are answered at a time.", "N", least=1)] = 2
    engine: Annotated[str, Setting("By threads here, or by actors on a Ray cluster.", choices=("threads", "ray"))] = "threads"
    workers: Annotated[int | None, Setting("Actors on the cluster; default: one a processor.", "N", least=1)] = None
    ray_address: Annotated[str, Setting("The cluster; auto: the one of this machine.", "ADDRESS")] = "auto"
    tries: Annotated[int, Setting("Tries of one prompt before it is written as failed.", "N", least=1)] = 3
    patience: Annotated[float, Setting("How long to wait for a server that is away or full, seconds.", "S", least=0.0)] = 600.0


@dataclass(frozen=True)
class Default:
    """What a line has that does not say."""

    max_new_tokens: Annotated[int, Setting("The most tokens of a reply.", "N", least=1, most=LONGEST)] = MAX_NEW_TOKENS
    ignore_eos: Annotated[bool, Setting("Go on after the end token.")] = False


@expand()
def batch(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help='OpenAI batch requests or {"prompt": ...}, one a line; .txt: prompts; -: standard input.')
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="OpenAI batch responses, one a line, as they come.")],
    whom: Whom,
    work: Work,
    default: Default,
    choice: Choice,
    pins: Pins,
    lengths: Lengths,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Answer every prompt of a file, each once, into another file.

    Stopped or killed at any moment, the same command goes on with what is
    left. A prompt that fails is written with its error; the exit code is 0
    once every line has a reply, and 4 if some failed for good.

    Example: privinf batch prompts.jsonl -o replies.jsonl --local models/pylib
    """
    if whom.local is None and whom.embedding is not None:
        raise ConfigError("--embedding is for the server to choose", remedy="give it to `privinf serve`, or with --local")
    options = make_options(runtime, pins, lengths, trust=whom.trust, embedding=whom.embedding)
    sampling = choice.sampling()
    from privinf.cli.screen import Screen
    from privinf.jobs.batch import batch as answer
    from privinf.session.cluster import aside

    asked = {name: value for name, value in vars(whom).items() if name in ("server", "dealer", "local")}
    keys = None if whom.keys is None else str(whom.keys)
    with Screen(quiet=as_json, plain=True) as screen:
        screen.say("connecting")
        given = {**asked, **vars(work), **vars(default), "keys": keys, "options": options, "sampling": sampling}
        with aside() if work.engine == "ray" else contextlib.nullcontext():
            found = answer(source, output, **given, progress=lambda now: screen.say(_line(now)))
    if as_json:
        common.write_json(found)
    else:
        print(f"{found['answered']} of {found['requests']} answered, {found['failed']} failed, {found['before']} were there already")
    if found["failed"]:
        raise typer.Exit(FAILED)


def _line(now: Progress) -> str:
    end = "" if now.left_s is None else f", ends about {time.strftime('%H:%M:%S', time.localtime(time.time() + now.left_s))}"
    return f"{now.done} of {now.total} prompts, {now.rate:.2f} a second{end}"
