"""Clients for measurements, each a process of its own: forked from one that has loaded the libraries, so that many start at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.networks import Network
from privinf.client.client import Client
from privinf.session.options import Options
from protocols.errors import ConfigError, PrivinfError, TransportError

CLEAR = 0.1
"""The margin between the two best float logits above which a private token must be float's."""
TRIES = 400


@dataclass(frozen=True)
class Clear:
    """A prompt, and the only greedy reply to it that a correct system can give."""

    ids: list[int]
    reply: list[int]


def clear_prompts(network: Network, count: int, seq: int, tokens: int, first: int = 0) -> list[Clear]:
    """Prompts of `seq` tokens whose `tokens` next ones are all best by CLEAR or more in float; ConfigError if they cannot be found."""
    found: list[Clear] = []
    for number in range(first, first + TRIES):
        ids = network.ids(seq, number)
        reply = clear_reply(network, ids, tokens)
        if reply is not None and ids not in [one.ids for one in found]:
            found.append(Clear(ids, reply))
        if len(found) == count:
            return found
    raise ConfigError(f"among {TRIES} prompts only {len(found)} have replies of {tokens} clear tokens", remedy="ask for fewer tokens")


def clear_reply(network: Network, ids: list[int], tokens: int) -> list[int] | None:
    """The `tokens` best next tokens, None if any of them is not clear."""
    reply: list[int] = []
    while len(reply) < tokens:
        best = network.floats(ids + reply).topk(2)
        if float(best.values[0] - best.values[1]) < CLEAR:
            return None
        reply.append(int(best.indices[0]))
    return reply


@dataclass(frozen=True)
class Answer:
    """A reply: its tokens, when it was asked for and when each token came (time.monotonic(), the same clock in all processes)."""

    tokens: list[int]
    began: float
    times: list[float]


@cache
def fork_server() -> Any:
    """Where processes are forked from; one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.callers"])
    return context


class Caller:
    """A client in a process of its own, which answers one question at a time."""

    def __init__(self, places: tuple[str, str, str], cache: Path, timeout: float) -> None:
        self._pipe, theirs = fork_server().Pipe()
        self._process = fork_server().Process(target=_answer, args=(theirs, places, str(cache), timeout), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of its process."""
        return int(self._process.pid)

    def ask(self, ids: list[int], tokens: int) -> None:
        """A session of its own; the answer is `take`n later."""
        self._pipe.send((ids, tokens))

    def take(self) -> Answer:
        """The answer to what was asked; TransportError with the client's own words where it failed."""
        try:
            found = self._pipe.recv()
        except EOFError:
            raise TransportError("a client's process ended by itself", party="client") from None
        if isinstance(found, str):
            raise TransportError(f"a client failed: {found}", party="client")
        return Answer(*found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()  # the end of its input ends it
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _answer(pipe: Pipe, places: tuple[str, str, str], cache: str, timeout: float) -> None:
    """In the new process."""
    torch.set_num_threads(1)
    server, dealer, keys = places
    with (
        Client(server, dealer=dealer or None, keys=keys, options=Options(cache=Path(cache), timeout=timeout)) as client,
        contextlib.suppress(EOFError),
    ):
        while True:
            ids, count = pipe.recv()
            began, tokens, times = time.monotonic(), [], []
            try:
                for token in client.generate(ids=ids, max_new_tokens=count, ignore_eos=True):
                    tokens.append(token.id)
                    times.append(time.monotonic())
            except PrivinfError as error:
                pipe.send(str(error))
                continue
            pipe.send((tokens, began, times))
