"""All three parties on this machine, as three processes over mutual TLS on loopback, with keys of their own."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from privinf.party.options import MAX_NEW_TOKENS, Options
from privinf.party.text import Token
from privinf.transport.keys import init_keys
from protocols import errors
from protocols.errors import PrivinfError, TransportError

END_S = 8.0


class Party:
    """A party's process and the events that it emits."""

    def __init__(self, role: str, config: dict[str, Any]) -> None:
        self.role = role
        self.ended: dict[str, Any] | None = None
        self.detail: dict[str, Any] = {}
        # -c would lose the package where it is not installed; -m finds it as the caller does
        self.process = subprocess.Popen(
            [sys.executable, "-m", "privinf", "_party", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the one who started us, who then ends us
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"privinf-local-{role}", daemon=True)
        self._reader.start()
        self.say(config)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "ended":
                self.ended = {key: event[key] for key in ("pid", "peak_rss_bytes", "traffic")}
                self.detail = {key: event[key] for key in ("links", "passes")}
            else:
                self._events.put(event)
        self._events.put(None)

    def say(self, message: dict[str, Any]) -> None:
        """A line for the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def next_event(self) -> dict[str, Any]:
        """The next event; what the process reports as its error is raised, and so is its end."""
        event = self._events.get()
        if event is None:
            self._events.put(None)
            code = self.process.wait()
            raise TransportError(f"the local {self.role} process ended with code {code}", party=self.role)
        if event["event"] == "error":
            error = getattr(errors, event["kind"], PrivinfError)(event["message"])
            error.exit_code = event["exit_code"]
            raise error
        return event

    def await_event(self, name: str) -> dict[str, Any]:
        """Events up to the one with this name."""
        while (event := self.next_event())["event"] != name:
            pass
        return event

    def end(self) -> None:
        """Ends the process: first by closing its input, then by force."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(END_S)


class LocalSession:
    """`with LocalSession("model_dir") as session:`; the same parties and the same code as over a network.

    The model is a lowered or a checkpoint directory, or a `Lowered`. Raises PrivinfError. `result` holds the contract's
    fields of the last query; `parties` those of `run` after the session has ended.
    """

    def __init__(
        self, model: Any, options: Options | None = None, *, dump: Path | None = None, clock: bool = False, progress: Any = None
    ) -> None:
        self.options, self._clock = options or Options(), clock
        self._model, self._dump, self._progress = model, dump, progress or (lambda phase, share: None)
        self._parties: dict[str, Party] = {}
        self._stack = contextlib.ExitStack()
        self.result: dict[str, Any] | None = None
        self.logits: list[dict[str, Any]] = []
        self._lowered: Any = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        _ = self.options.emulated  # a malformed link is the user's error, before anything starts
        root = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="privinf-")))
        keys = root / "keys"
        init_keys(keys, ("localhost", "127.0.0.1"))
        model = self._model
        if hasattr(model, "save"):
            model.save(root / "model")
            model = root / "model"
        common = {"options": {**asdict(self.options), "cache": str(self.options.cache)}, "threads": 1, "clock": self._clock}
        if self._dump is not None:
            common["dump"] = str(self._dump)
        self._parties["dealer"] = Party("dealer", {**common, "keys": str(keys)})
        # started before they are needed, so that the three load their libraries side by side
        dealer = self._parties["dealer"].await_event("listening")["address"]
        self._parties["server"] = Party("server", {**common, "keys": str(keys), "model": str(model), "dealer": dealer})
        server = self._parties["server"].await_event("listening")["address"]
        self._parties["client"] = Party("client", {**common, "keys": str(keys), "server": server, "dealer": dealer})
        self._parties["client"].await_event("ready")

    def generate(
        self,
        prompt: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
    ) -> Iterator[Token]:
        """As `privinf.Client.generate`."""
        client = self._parties["client"]
        ids = None if ids is None else [int(number) for number in ids]
        client.say({"prompt": prompt, "ids": ids, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "logits": logits})
        while True:
            event = client.next_event()
            if event["event"] == "token":
                yield Token(event["id"], event["text"])
            elif event["event"] == "progress":
                self._progress(event["phase"], event["share"])
            elif event["event"] == "result":
                self.result, self.logits = event["result"], event["logits"]
                return

    def run(self, *inputs: Any) -> Any:
        """A private pass; see `privinf.Client.run`."""
        from privinf.party.child import decode_tensor, encode_tensor

        client = self._parties["client"]
        client.say({"inputs": [encode_tensor(x) for x in inputs]})
        output = decode_tensor(client.await_event("output")["output"])
        self.result = client.await_event("result")["result"]
        return output

    @property
    def traffic(self) -> dict[str, Any]:
        """What was counted at the client in the last query."""
        return self.result["traffic"] if self.result else {}

    @property
    def parties(self) -> dict[str, Any]:
        """{`server`, `client`, `dealer`: {`pid`, `peak_rss_bytes`, `traffic`}}, once the session is closed."""
        return {role: self._parties[role].ended for role in ("server", "client", "dealer") if role in self._parties}

    @property
    def details(self) -> dict[str, Any]:
        """Of each party, once the session is closed: `links`, the meters' snapshots of its last connections, each with its
        `peer`; and with `clock` `passes`, the seconds of each operator of each pass."""
        return {role: party.detail for role, party in self._parties.items()}

    def close(self) -> None:
        """Ends the three processes; may be called again."""
        for role in ("client", "server", "dealer"):
            if role in self._parties:
                self._parties[role].end()
        self._stack.close()


def local_session(model: Any, **options: Any) -> LocalSession:
    """`with privinf.local_session(lowered) as session:`; `options` are the fields of `privinf.Options`."""
    return LocalSession(model, Options(**options))
