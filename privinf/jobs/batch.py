"""`privinf.batch`: many prompts, each answered once, however often the job is ended and begun again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from privinf.client.sampling import GREEDY, Sampling
from privinf.jobs.files import Replies, Requests
from privinf.jobs.request import Defaults
from privinf.jobs.worker import Reply, Terms, Worker
from privinf.session.options import MAX_NEW_TOKENS, Options
from protocols.errors import ConfigError

ENGINES = ("threads", "ray")


@dataclass(frozen=True)
class Progress:
    """How far a job is: requests in all, of them answered or failed, and those of this run and its seconds."""

    total: int
    done: int
    now: int
    seconds: float

    @property
    def rate(self) -> float:
        """Replies a second of this run."""
        return self.now / self.seconds if self.seconds else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate; None where nothing is known of it."""
        return (self.total - self.done) / self.rate if self.now else None


class Engine(Protocol):
    """Answers lines by several workers."""

    def replies(self, pending: Iterator[tuple[int, str]]) -> Generator[Reply, None, None]:
        """In the order in which they end; raises what keeps a worker from answering at all."""


@contextlib.contextmanager
def _parties(
    local: str | Path | None, server: str | None, dealer: str | None, keys: str | None, options: Options
) -> Iterator[tuple[str, str | None, str]]:
    """(server, dealer, keys) that are given, or of parties that are started here and end with the block."""
    if (local is None) == (server is None) or (server is not None and keys is None):
        raise ConfigError("a job asks a server, or local parties", remedy="give --server and --keys, or --local MODEL alone")
    if server is not None and keys is not None:
        yield server, dealer, keys
        return
    from privinf.local.session import LocalSession

    with LocalSession(local, options, watch=lambda role, event: None) as session:
        yield session.addresses["server"], session.addresses.get("dealer"), str(session.keys)


def batch(
    source: str | Path,
    output: str | Path,
    *,
    server: str | None = None,
    dealer: str | None = None,
    keys: str | None = None,
    local: str | Path | None = None,
    sessions: int = 2,
    engine: str = "threads",
    workers: int | None = None,
    ray_address: str = "auto",
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
    ignore_eos: bool = False,
    tries: int = 3,
    patience: float = 600.0,
    options: Options | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Answers every request of a file into another; called again with the same files, it does what is left.

    A line of `source` (`-`: standard input) is an OpenAI batch request for /v1/completions or `{"prompt": ...}`, or in a file that ends in
    .txt a prompt; a line of `output` an OpenAI batch response, on the disk before the next is. What a line does not say, the arguments do.
    `sessions` prompts at a time, of threads here or, with `engine` "ray", spread over `workers` actors on a cluster (without it: one a
    processor); those of a process are answered in the same passes where that can be. A request that fails `tries` times is written as
    failed; a server that is away or full is waited for, `patience` seconds at most.

    Returns {`requests`, `answered`, `failed`, `before` (those that were there already), `tokens` (new ones of this run), `seconds`,
    `model`, `trust`}. ConfigError for files that do not go together, and whatever PrivinfError keeps the server from answering at all.
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}", remedy=f"give {' or '.join(ENGINES)}")
    if sessions < 1 or tries < 1 or (workers is not None and workers < 1):
        raise ConfigError("a job has at least one session, one worker and one try")
    if workers is not None and engine != "ray":
        raise ConfigError("workers are a cluster's", remedy="give --engine ray, or --sessions alone")
    options, requests, tell = options or Options(), Requests(Path(source)), progress or (lambda now: None)
    with Replies(Path(output), requests.check()) as replies:
        total, before, began, tokens = len(replies.wanted), len(replies.done), time.monotonic(), 0
        about: dict[str, Any] = {"model": replies.model, "trust": None}
        if before < total:
            with _parties(local, server, dealer, keys, options) as where:
                whom: dict[str, Any] = {**dict(zip(("server", "dealer", "keys"), where, strict=True)), "options": options, "tries": tries}
                terms = Terms(**whom, defaults=Defaults(max_new_tokens, sampling, ignore_eos), patience=patience, text=requests.text)
                first = Worker(terms)
                with contextlib.closing(first):
                    about["model"], about["trust"] = first.model()  # and the set-up, before several ask for it
                    if replies.model not in (None, about["model"]):
                        remedy = "give this job a file of its own, or --expect the other model"
                        raise ConfigError(f"{output} has replies of another model than this server's", remedy=remedy)
                    pending = _pending(requests, replies)
                    engaged = _threads if engine == "threads" else partial(_actors, workers, ray_address)
                    with contextlib.closing(engaged(terms, min(sessions, total - before), first).replies(pending)) as found:
                        for reply in found:
                            replies.add(reply.custom_id, reply.status, reply.body)
                            tokens += reply.body["usage"]["completion_tokens"] if reply.status == 200 else 0
                            tell(Progress(total, len(replies.done), len(replies.done) - before, time.monotonic() - began))
        counts = {"requests": total, "answered": len(replies.done) - replies.failed, "failed": replies.failed, "before": before}
        return {**counts, "tokens": tokens, "seconds": time.monotonic() - began, **about}


def _pending(requests: Requests, replies: Replies) -> Iterator[tuple[int, str]]:
    """What has no reply yet, read anew; ConfigError where that is not what was there when the job began."""
    seen = set[str]()
    for number, line, request in requests.read():
        if replies.wanted.get(request.custom_id) != request.id or request.custom_id in seen:
            break
        seen.add(request.custom_id)
        if request.custom_id not in replies.done:
            yield number, line
    else:
        if len(seen) == len(replies.wanted):
            return
    raise ConfigError(f"{requests.path} has changed since this job began", remedy="run the same command again with all of its requests")


def _threads(terms: Terms, count: int, first: Worker) -> Engine:
    from privinf.jobs.threads import Threads

    return Threads(terms, count, first)


def _actors(workers: int | None, address: str, terms: Terms, count: int, first: Worker) -> Engine:
    from privinf.jobs.cluster import Actors

    first.close()
    return Actors(terms, count, together=first.shareable, workers=workers, address=address)
