"""Options that several verbs have, beside those of `privinf.session.options`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.cli import common
from privinf.session.options import EMBEDDING_TEXT, LONGEST, MAX_NEW_TOKENS, Ending, Options, Runtime
from privinf.setting import Setting
from privinf.trust import EMBEDDINGS, TRUSTS
from protocols.errors import ConfigError

SERVICE = Ending(drain=3.0)  # with what follows it, a party ends within the 10 seconds that it has

NO_PEER = ("link", "device", "timeout", "connect_timeout")
"""What of `Runtime` a verb has no use for that reads what is here."""

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A lowered directory, or a checkpoint directory, which is lowered on the way.")
]
OwnModel = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A lowered directory, or a checkpoint directory; without one, the model that comes with the package.",
        show_default=False,
    ),
]
Expect = Annotated[str | None, Setting("Refuse any model but the one with this id.", "ID")]
Logits = Annotated[bool, Setting("Ask for rounded logits too, which the server must allow.")]
Retry = Annotated[int, Setting("Where a connection breaks, go on in a fresh session, N times at most.", "N", least=0)]
Listen = Annotated[str, Setting("The address to listen on; port 0 takes any free one.", "HOST:PORT")]
Keys = Annotated[Path, Setting("What `privinf keys init` made, or this role's bundle of it.", "DIR")]
Metrics = Annotated[str | None, Setting("Answer Prometheus there, at /metrics, and probes at /healthz and /readyz.", "HOST:PORT")]
Workers = Annotated[
    int, Setting("Processes that serve behind the one address; a server's share the weights in memory.", "N", least=1, most=256)
]
Log = Annotated[str, Setting("Log each session once it is over, without content, or only what is wrong.", choices=("info", "warning"))]

Trust = Annotated[str, Setting("Who makes the correlations: a dealer, or server and client alone.", choices=TRUSTS)]
Embedding = Annotated[str | None, Setting(EMBEDDING_TEXT, choices=EMBEDDINGS)]
ExpectTrust = Annotated[str | None, Setting("Refuse a server with another trust model; default: what it has.", choices=TRUSTS)]
MaybeDealer = Annotated[str | None, Setting("Where the dealer listens, if the server has one.", "HOST:PORT")]

Threads = Annotated[int | None, Setting("Processor threads; default: PyTorch's choice.", "N", least=1)]


@dataclass(frozen=True)
class Text:
    """What is trained on, and looked at."""

    corpus: Annotated[Path | None, Setting("Directory of text or code; default: this interpreter's standard library.", "DIR")] = None
    files: Annotated[str | None, Setting("Which files of the corpus, such as *.py.", "GLOB")] = None


@dataclass(frozen=True)
class Peers:
    """Of a client."""

    server: Annotated[str, Setting("Where the server listens.", "HOST:PORT")]
    keys: Keys
    dealer: MaybeDealer = None
    trust: ExpectTrust = None


@dataclass(frozen=True)
class Engine:
    """Where a verb's own work is done: here, or on a cluster."""

    engine: Annotated[str, Setting("Work on this machine, or by actors on a Ray cluster.", choices=("here", "ray"))] = "here"
    ray_address: Annotated[str, Setting("The cluster; auto: the one of this machine.", "ADDRESS")] = "auto"


@dataclass(frozen=True)
class Cluster(Engine):
    """And by how many sessions there."""

    sessions: Annotated[int, Setting("With --engine ray: actors, each with a session of its own.", "N", least=1)] = 2


@dataclass(frozen=True)
class PromptText:
    """Exactly one of the three; not shown, for a prompt is a secret."""

    prompt: Annotated[str | None, Setting("The prompt.", "TEXT")] = None
    prompt_file: Annotated[Path | None, Setting("The prompt, from a file; - for standard input.", "F")] = None
    prompt_ids: Annotated[str | None, Setting("The prompt as token ids; no tokenizer is needed.", "1,2,3")] = None

    def __repr__(self) -> str:
        return "PromptText(hidden)"

    def read(self) -> common.PromptOption:
        """ConfigError unless it is exactly one, and not empty."""
        return common.read_prompt(self.prompt, self.prompt_file, self.prompt_ids)


@dataclass(frozen=True)
class PromptTexts:
    """One of the three, of which the first and the last may be given several times; not shown, for prompts are secrets."""

    prompt: Annotated[list[str] | None, Setting("The prompt; several are answered together.", "TEXT")] = None
    prompt_file: Annotated[Path | None, Setting("The prompt, from a file; - for standard input.", "F")] = None
    prompt_ids: Annotated[
        list[str] | None, Setting("The prompt as token ids; no tokenizer is needed; several are answered together.", "1,2,3")
    ] = None

    def __repr__(self) -> str:
        return "PromptTexts(hidden)"

    def read(self) -> common.PromptOption | common.PromptOptions:
        """ConfigError unless it is of one of them, and where it is a single prompt, not empty."""
        texts, ids = self.prompt or [], self.prompt_ids or []
        if max(len(texts), len(ids)) <= 1:
            return common.read_prompt(texts[0] if texts else None, self.prompt_file, ids[0] if ids else None)
        common.only_one(texts or None, self.prompt_file, ids or None)
        return common.PromptOptions(texts or None, [common.read_ids(each, "--prompt-ids") for each in ids] or None)


@dataclass(frozen=True)
class Asked:
    """What a reply is to be."""

    max_new_tokens: Annotated[int, Setting("The most tokens to generate.", "N", least=1, most=LONGEST)] = MAX_NEW_TOKENS
    ignore_eos: Annotated[bool, Setting("Go on after the end token.")] = False
    logits: Logits = False


@dataclass(frozen=True)
class Choice:
    """How the client chooses the next token, and where a reply ends."""

    temperature: Annotated[float, Setting("0: the best token, always; above: chosen by the client from logits.", "X")] = 0.0
    top_k: Annotated[int, Setting("Choose among the K best tokens; 0: among all.", "K")] = 0
    top_p: Annotated[float, Setting("Choose among the best tokens that have the probability P together.", "P")] = 1.0
    seed: Annotated[int | None, Setting("Names the random numbers of the choice; default: fresh ones.", "N")] = None
    stop: Annotated[list[str] | None, Setting("End the reply before this text; may be given several times.", "TEXT")] = None
    stop_ids: Annotated[str | None, Setting("End the reply at these tokens too.", "1,2,3")] = None

    def sampling(self) -> Any:
        """ConfigError if an option of it would have no effect."""
        from privinf.client.sampling import Sampling

        if self.temperature == 0 and (self.top_k or self.top_p != 1 or self.seed is not None):
            raise ConfigError("--top-k, --top-p and --seed choose among several tokens", remedy="give a --temperature above 0 too")
        ends = () if self.stop_ids is None else tuple(common.read_ids(self.stop_ids, "--stop-ids"))
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed, tuple(self.stop or ()), ends)


def check_times(runtime: Runtime) -> None:
    """ConfigError unless both are times to wait."""
    for name, seconds in (("--timeout", runtime.timeout), ("--connect-timeout", runtime.connect_timeout)):
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"{name} {seconds:g} is no time to wait", remedy="give seconds above 0")


def make_options(runtime: Runtime, *parts: Any, **others: Any) -> Options:
    """The runtime's `Options`, checked here so that a slip is named before anything starts."""
    check_times(runtime)
    _ = runtime.emulated
    return Options(**{name: value for part in (runtime, *parts) for name, value in vars(part).items()}, **others)
