"""Server and client alone for tests: in threads of this process, and the command line's verbs as processes. The ends are the plain ones."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from privinf.client.client import Client
from privinf.lowering.lowered import Lowered
from privinf.server.server import Server
from privinf.session.options import Options
from privinf.trust import TWO_PARTY
from tests.support import trio as t
from tests.support.faults import Fault, Relay
from tests.support.plain_ends import PlainEnds, plain_ends
from tests.support.trio import Hook, Process
from tests.support.waiting import PATIENCE


@dataclass
class Duo:
    """A server in threads of this process, and clients at will."""

    server: Server
    cache: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def client(self, *, fresh: bool = False, **options: Any) -> Client:
        """A client; with `fresh` nothing is in its cache."""
        options.setdefault("cache", self.cache / f"fresh-{next(self._numbers)}" if fresh else self.cache)
        return Client(self.server.address, keys=str(t.keys()), options=Options(**{"timeout": PATIENCE, **options}))


@contextlib.contextmanager
def duo(model: Lowered | None = None, *, allow_logits: bool = True, plain: bool = True, **options: Any) -> Iterator[Duo]:
    """A server, which ends with the block."""
    torch.set_num_threads(1)
    made = Options(**{"timeout": PATIENCE, "cache": t.scratch() / "cache", **options})
    common: dict[str, Any] = {"listen": "127.0.0.1:0", "keys": str(t.keys()), "trust": TWO_PARTY, "allow_logits": allow_logits}
    with (
        plain_ends() if plain else contextlib.nullcontext(),
        Server(model or t.lowered(), options=made, **common) as server,
    ):
        yield Duo(server, Path(made.cache))


@dataclass
class Served:
    """`privinf serve` as a process, with its address, and a fault on the link between it and its clients."""

    server: Process
    address: str
    fault: Fault | None = None

    def generate(
        self, *words: object, hook: Hook | None = None, plain: bool = True, timeout: float = PATIENCE, verb: str = "generate"
    ) -> Process:
        """`privinf generate`, or another verb; without `plain`, and with a hook, its ends are the real ones."""
        prompt = ("--prompt-ids", "1,2,3") if verb == "generate" else ()
        common = ("--server", self.address, "--keys", t.keys(), "--timeout", timeout, *prompt)
        if "--cache" not in words:
            words = (*words, "--cache", t.scratch() / "cache")
        client = Process(verb, *common, *words, hook=hook or (PlainEnds() if plain else None))
        if self.fault is not None and not self.fault.victim.done():
            self.fault.victim.set_result(client)
        return client

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[Served]:
        """The same to a client, with a fault on the link; a client that it strikes is the next one."""
        if fault.role == "server":
            fault.victim.set_result(self.server)
        with Relay(self.address, fault.link, t.keys(), fault) as relay:
            yield replace(self, address=relay.address, fault=fault)


@contextlib.contextmanager
def served(*words: object, hook: Hook | None = None, timeout: float = PATIENCE, plain: bool = True) -> Iterator[Served]:
    """A server, which ends with the block."""
    common = ("--trust", TWO_PARTY, "--listen", "127.0.0.1:0", "--keys", t.keys(), "--timeout", timeout, "--cache", t.scratch() / "cache")
    ends = hook or (PlainEnds() if plain else None)
    with Process("serve", t.lowered_directory(), "--log", "warning", *common, *words, hook=ends) as process:
        yield Served(process, t.address_of(process))
