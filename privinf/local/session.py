"""All parties on this machine, as processes over mutual TLS on loopback, with keys of their own: three, or two where there is no dealer."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, Self, Unpack, overload

from privinf.client.listed import Placed, several
from privinf.client.sampling import Sampling
from privinf.client.text import Token, whole_numbers
from privinf.client.wanted import Wanted, Wishes
from privinf.local.forks import Forks
from privinf.session.options import Options
from privinf.transport.failure import Failure
from privinf.transport.keys import init_keys
from privinf.trust import TWO_PARTY
from protocols.errors import ConfigError, PrivinfError, TransportError

END_S = 10.0
QUICK_END_S = 2.0
"""How long the processes may take to end by themselves when something has failed. They are ended by force then."""
SILENCE_S, LOADING_S = 30.0, 120.0
"""The longest time without a sign of life from a process that runs, and until it does: loading may take a while on a cold disk."""
ROOT = Path(__file__).resolve().parents[2]


def _environment(threads: int) -> dict[str, str]:
    """For a process that finds this very package, and computes with this many threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if ROOT not in installed:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return environment


class PartyProcess:
    """A party's process and the events that it emits."""

    def __init__(
        self, role: str, forks: Forks, *, stderr: IO[bytes] | None, watch: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self.role, self._watch = role, watch
        self.ended: dict[str, Any] | None = None
        self.detail: dict[str, Any] = {}
        self._stderr = stderr
        self._writing = threading.Lock()
        self._queues: dict[int | None, queue.Queue[dict[str, Any] | None]] = {None: queue.Queue()}  # None: what is of no query
        self._over = False
        self._heard = time.monotonic()
        try:
            self.process = forks.bear(role, stderr)
        except OSError as error:
            raise TransportError(f"the local {role} process cannot be started: {error.strerror or error}", party=role) from None
        self._reader = threading.Thread(target=self._read, name=f"privinf-local-{role}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._heard = time.monotonic()
            with contextlib.suppress(ValueError):  # the last line of a process that was killed may be cut
                self._take(json.loads(line))
        with self._writing:
            self._over = True
            for waiting in self._queues.values():
                waiting.put(None)

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "ended":
            self.ended = {key: event[key] for key in ("pid", "peak_rss_bytes", "traffic")}
            self.detail = {key: event[key] for key in ("links", "passes")}
        elif event["event"] == "seen":
            if self._watch is not None:
                self._watch(self.role, event)
        elif event["event"] == "log":
            logging.getLogger(event["name"]).log(event["level"], "%s", event["message"])
        elif event["event"] != "alive" and (waiting := self._queues.get(event.get("query"))) is not None:
            waiting.put(event)

    def begin(self, query: int) -> None:
        """Events of this query are kept from now on, until `forget`."""
        with self._writing:
            self._queues[query] = queue.Queue()
            if self._over:
                self._queues[query].put(None)

    def forget(self, query: int) -> None:
        """Events of this query are dropped."""
        with self._writing:
            self._queues.pop(query, None)

    def say(self, message: dict[str, Any]) -> None:
        """A line for the process."""
        assert self.process.stdin is not None
        with self._writing, contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, which the next event says
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def next_event(self, query: int | None = None) -> dict[str, Any]:
        """The next event of a query; what the process reports as its error is raised, and so are its end and its silence."""
        while True:
            try:
                event = self._queues[query].get(timeout=1.0)
            except queue.Empty:
                most = SILENCE_S if self.process.born else LOADING_S
                if time.monotonic() - max(self._heard, self.process.born) > most:
                    message = f"no sign of life from the local {self.role} process for {most:g} s"
                    raise TransportError(message, party=self.role, remedy="it was stopped, or the machine is overloaded") from None
                continue
            if event is None:
                self._queues[query].put(None)
                raise self.death()
            if event["event"] == "error":
                raise Failure.from_plain(event["failure"]).error()
            return event

    def await_event(self, name: str) -> dict[str, Any]:
        """Events of no query up to the one with this name."""
        while (event := self.next_event())["event"] != name:
            pass
        return event

    def death(self) -> TransportError:
        """How the process ended, with the last line that it left."""
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        lines: list[str] = []
        if self._stderr is not None:
            self._stderr.seek(0)
            lines = [line for line in self._stderr.read()[-4096:].decode("utf-8", "replace").splitlines() if line.strip()]
        message = f"the local {self.role} process {how}" + (f": {lines[-1].strip()}" if lines else "")
        remedy = "run again with --debug for more" if code >= 0 else "look at the machine's memory, and at who ended it"
        return TransportError(message, party=self.role, remedy=remedy)

    def has_died(self, within: float) -> bool:
        """Whether the process ends within these seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within)
            return True
        return False

    def hang_up(self) -> None:
        """Asks the process to end, by the end of its input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        """Ends the process by force, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(END_S)
        if not self._reader.is_alive() and self.process.stdout is not None:
            self.process.stdout.close()


class LocalSession:
    """`with LocalSession("model_dir") as session:`; the same parties and the same code as over a network.

    The model is a lowered or a checkpoint directory, or a `Lowered`. Raises PrivinfError. `result` holds the contract's
    fields of the last query; `parties` those of `run` after the session has ended. `devices` are of single roles. Several threads may
    ask at a time, and are answered one after the other.

    With `watch` there is no client's process, and the caller is the client, by `addresses` and `keys`: `watch` gets the role of a party
    and what that party has received, see `privinf.local.watch`.

    Seven of its attributes are the arguments, which are read when the processes start, and four are what callers read.
    """

    def __init__(
        self,
        model: Any,
        options: Options | None = None,
        *,
        dump: Path | None = None,
        clock: bool = False,
        devices: Mapping[str, str] | None = None,
        progress: Any = None,
        watch: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        self.options, self._clock, self._devices = options or Options(), clock, devices or {}
        self._model, self._dump, self._progress = model, dump, progress or (lambda phase, share: None)
        self._watch = watch
        self.addresses: dict[str, str] = {}
        self.keys: Path | None = None
        self._parties: dict[str, PartyProcess] = {}
        self._stack = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self._predicted: dict[str, Any] | None = None
        self._asked: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None
        self.logits: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close(at_once=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=kind is not None)

    def _start(self) -> None:
        _ = self.options.emulated  # a malformed link is the user's error, before anything starts
        root = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="privinf-", ignore_cleanup_errors=True)))
        keys = root / "keys"
        alone = self.options.trusted == TWO_PARTY
        init_keys(keys, ("localhost", "127.0.0.1"), dealer=not alone)
        model = self._model
        if hasattr(model, "save"):
            model.save(root / "model")
            model = root / "model"
        elif not Path(model).is_dir():
            raise ConfigError(f"there is no model directory {model}")
        level = logging.getLogger("privinf").getEffectiveLevel()
        roles = (*(() if alone else ("dealer",)), "server", *(() if self._watch else ("client",)))
        errors = {role: None if level <= logging.DEBUG else self._stack.enter_context((root / f"{role}.err").open("w+b")) for role in roles}
        try:
            forks = Forks(_environment(1), errors[roles[0]])
        except OSError as error:
            raise TransportError(f"the local processes cannot be started: {error.strerror or error}", party=roles[0]) from None
        self._stack.callback(forks.close)
        for role in roles:
            self._parties[role] = PartyProcess(role, forks, stderr=errors[role], watch=self._watch)
        tokenizer = None if self.options.tokenizer is None else str(self.options.tokenizer.absolute())
        chosen = {"cache": str(self.options.cache.absolute()), "tokenizer": tokenizer, "trust": self.options.trusted}
        options = {**asdict(self.options), **chosen}
        common: dict[str, Any] = {"options": options, "keys": str(keys), "log_level": level, "clock": self._clock}
        common["watch"] = self._watch is not None
        if self._dump is not None:
            common["dump"] = str(self._dump)
        parties = self._parties
        own = {role: {**common, "options": {**options, "device": self._devices.get(role, self.options.device)}} for role in parties}
        own[roles[0]]["scratch"] = str(root)
        if not alone:
            parties["dealer"].say(own["dealer"])
        parties["server"].say({**own["server"], "model": str(Path(model).absolute())})
        if not alone:
            self.addresses["dealer"] = parties["dealer"].await_event("listening")["address"]
        parties["server"].say({"dealer": self.addresses.get("dealer")})
        self.addresses["server"], self.keys = parties["server"].await_event("listening")["address"], keys
        if "client" in parties:
            parties["client"].say({**own["client"], **self.addresses})
            parties["client"].await_event("ready")

    def _ask(self, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a query but for progress; what is left of it when the caller turns away is dropped."""
        client = self._parties.get("client")
        if client is None:
            raise ConfigError("this local session has not been started", remedy="use it in a with statement")
        number = next(self._numbers)
        client.begin(number)
        done = False
        try:
            client.say({"query": number, **query})
            while not done:
                event = client.next_event(number)
                if event["event"] == "progress":
                    self._progress(event["phase"], event["share"])
                    continue
                if event["event"] == "result":
                    self.result, self.logits, done = event["result"], event["logits"], True
                    self._asked, self._predicted = query, None
                yield event
        except PrivinfError as error:
            done = True
            for role, party in self._parties.items():  # the client saw a connection break; here is why
                if role != "client" and not isinstance(error, ConfigError) and party.has_died(0.3):
                    raise party.death() from error
            raise
        finally:
            client.forget(number)
            if not done:
                client.say({"cancel": number})

    @overload
    def generate(self, prompt: str | None = None, *, ids: Sequence[int] | None = None, **wishes: Unpack[Wishes]) -> Iterator[Token]: ...

    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], *, ids: None = None, **wishes: Unpack[Wishes]) -> Iterator[Placed]: ...

    @overload
    def generate(self, prompt: None = None, *, ids: Sequence[Sequence[int]], **wishes: Unpack[Wishes]) -> Iterator[Placed]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...] | None = None,
        *,
        ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **wishes: Unpack[Wishes],
    ) -> Iterator[Token] | Iterator[Placed]:
        """As `privinf.Client.generate`, with the same arguments but for `retry`; of a list pairs of an index and a token come."""
        query = {"prompt": prompt, "ids": ids, **asdict(Wanted(**wishes))}
        if not several(prompt, ids):
            query["ids"] = None if ids is None else whole_numbers(ids)  # type: ignore[arg-type]
            return (token for _, token in self._tokens(query))
        if ids is not None:
            query["ids"] = [whole_numbers(each) for each in ids]  # type: ignore[arg-type]
        return self._tokens(query)

    def _tokens(self, query: dict[str, Any]) -> Iterator[Placed]:
        for event in self._ask(query):
            if event["event"] == "token":
                yield Placed(event.get("index", 0), Token(event["id"], event["text"]))

    def run(self, *inputs: Any) -> Any:
        """A private pass; see `privinf.Client.run`."""
        from privinf.local.child import decode_tensor, encode_tensor

        if not all(hasattr(x, "detach") for x in inputs):
            raise ConfigError("a private pass takes tensors")
        events = {event["event"]: event for event in self._ask({"inputs": [encode_tensor(x) for x in inputs]})}
        return decode_tensor(events["output"]["output"])

    @property
    def traffic(self) -> dict[str, Any]:
        """What was counted at the client in the last query."""
        return self.result["traffic"] if self.result else {}

    @property
    def costs(self) -> dict[str, Any]:
        """What was to be expected of the last query, per layer and operator: `total` and `ops` as `privinf explain` has them.

        Of a list of prompts nothing: `explain` has a `batch` of prompts of one length.
        """
        if self.result is None or "replies" in self.result:
            return {}
        if self._predicted is None:
            from privinf.lowering.explain import explain
            from privinf.server.models import open_model

            lowered = self._model if hasattr(self._model, "graph") else open_model(Path(self._model), self.options.cache)
            asked, chosen = self._asked, Sampling(**self._asked.get("sampling", {}))
            logits = bool(asked.get("logits", True)) or asked.get("logprobs") is not None or chosen.takes_logits
            seq, tokens = (max(1, self.result["padded"][name]) for name in ("prompt_tokens", "tokens"))
            chunk = self.options.chunk if self.result["prompt_tokens"] else 0
            trust, embedding = self.options.trusted, self.options.embedded
            size: dict[str, Any] = {"new_tokens": tokens, "chunk": chunk, "scores": bool(self._asked.get("score_prompt"))}
            self._predicted = explain(lowered, seq, logits=logits, **size, trust=trust, embedding=embedding)
        return self._predicted

    @property
    def parties(self) -> dict[str, Any]:
        """{`server`, `client`, and `dealer` if there is one: {`pid`, `peak_rss_bytes`, `traffic`}}, once the session is closed."""
        return {role: self._parties[role].ended for role in ("server", "client", "dealer") if role in self._parties}

    @property
    def details(self) -> dict[str, Any]:
        """Of each party, once the session is closed.

        `links`: the meters' snapshots of its last connections, each with its `peer`; with `clock` also `passes`, the seconds of each
        operator of each pass.
        """
        return {role: party.detail for role, party in self._parties.items()}

    def close(self, *, at_once: bool = False) -> None:
        """Ends the processes, the client first; `at_once` all together, and soon by force. May be called again."""
        parties = list(self._parties.values())
        last = [party for party in parties if party.role != "client"]
        try:
            groups = [parties] if at_once else [[party for party in parties if party not in last], last]
            for group in groups:
                for party in group:
                    party.hang_up()
                deadline = time.monotonic() + (QUICK_END_S if at_once else END_S)
                for party in group:
                    party.has_died(max(0.0, deadline - time.monotonic()))
        finally:
            for party in parties:
                party.kill()
            self._stack.close()


def local_session(model: Any, **options: Any) -> LocalSession:
    """`with privinf.local_session(lowered) as session:`; `options` are the fields of `privinf.Options`."""
    unknown = sorted(set(options) - {field.name for field in fields(Options)})
    if unknown:
        raise ConfigError(f"no such option: {', '.join(unknown)}", remedy="the fields of privinf.Options are the options")
    return LocalSession(model, Options(**options))
