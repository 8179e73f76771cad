"""One party of a local session, as a process: `python -m privinf _party ROLE`, driven over its standard input and output.

One JSON object a line. The first line on standard input is the configuration; a server is told its dealer's address in a
second one, once that is known; a client gets its queries there, each with a number, and may be told to drop one. Events go
to standard output, and one that belongs to a query has its number; a sign of life goes there every few seconds. The end of
standard input ends the process, so that no party outlives the one who started it.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privinf.client.sampling import Sampling
from privinf.session.memory import few_arenas, look_through, rare_collections
from privinf.session.options import Options
from privinf.session.outlet import Outlet
from privinf.transport.failure import Failure
from protocols.errors import Code, PrivinfError

if TYPE_CHECKING:
    from privinf.client.client import Client
    from privinf.local.clock import Clock

BEAT_S = 2.0
SETTLE_S = 1.5
"""How long the sessions of a party that is to end may take to end by themselves."""
GRACE_S = 8.0
"""How long the process may live once its standard input has ended."""


class Parent:
    """The process that started this one: lines from it, events to it."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)  # what a library prints must not get between the events
        self._lock = threading.Lock()
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: the end
        self.on_cancel: Callable[[int], None] = lambda number: None
        self.on_end: Callable[[], None] = lambda: None
        for job in (self._read, self._beat):
            threading.Thread(target=job, name=f"parent{job.__name__}", daemon=True).start()

    def emit(self, event: str, **values: Any) -> None:
        """One event; BrokenPipeError if nobody is left to read it."""
        data = memoryview((json.dumps({"event": event, **values}) + "\n").encode())
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]

    def _read(self) -> None:
        parts: list[bytes] = []
        while chunk := os.read(0, 1 << 16):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                message = json.loads(b"".join([*parts, end]))
                parts = []
                if "cancel" in message:
                    self.on_cancel(message["cancel"])
                else:
                    self.lines.put(message)
            parts.append(rest)
        self.lines.put(None)
        self.on_end()
        time.sleep(GRACE_S)
        os._exit(1)  # native code that does not come back, a lowering say, must not outlive its purpose

    def _beat(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            while True:
                self.emit("alive")
                time.sleep(BEAT_S)


class _Forward(logging.Handler):
    """Log records as events: the parent has the terminal. They wait for nobody, other events do."""

    def __init__(self, parent: Parent, *, debug: bool) -> None:
        super().__init__()
        self._outlet = Outlet(lambda event: parent.emit("log", **event), self._lost)
        self.setFormatter(logging.Formatter("%(message)s") if debug else _Plain())

    @staticmethod
    def _lost(count: int) -> dict[str, Any]:
        return {"name": "privinf", "level": logging.WARNING, "message": f"{count} lines were dropped, because nobody read them"}

    def emit(self, record: logging.LogRecord) -> None:
        self._outlet.put({"name": record.name, "level": record.levelno, "message": self.format(record)})

    def close(self) -> None:
        self._outlet.close()
        super().close()


class _Plain(logging.Formatter):
    """A record's message without its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage()


def _log_to(parent: Parent, role: str, level: int) -> None:
    debug = level <= logging.DEBUG
    logging.basicConfig(level=level, handlers=[_Forward(parent, debug=debug)], force=True)
    if not debug:
        # how a session failed is what the client's error says: once is enough
        logging.getLogger(f"privinf.{role}").setLevel(logging.ERROR)


def _options(config: dict[str, Any]) -> Options:
    return Options(**{**config["options"], "cache": Path(config["options"]["cache"])})


def encode_tensor(x: Any) -> dict[str, Any]:
    """A tensor as JSON: dtype, shape and bytes."""
    array = x.detach().cpu().contiguous().numpy()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def decode_tensor(value: dict[str, Any]) -> Any:
    """The inverse."""
    import numpy as np
    import torch

    array = np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value["dtype"])).reshape(value["shape"])
    return torch.from_numpy(array.copy())


def _finish(parent: Parent, traffic: dict[str, Any], links: Iterable[dict[str, Any]], clock: Clock | None) -> None:
    """`links` are the meters' snapshots of the last connections, `clock` the seconds of each pass where they were asked for."""
    from privinf.session.report import peak_rss_bytes

    passes = clock.report() if clock else []
    parent.emit("ended", pid=os.getpid(), peak_rss_bytes=peak_rss_bytes(), traffic=traffic, links=list(links), passes=passes)


def _clock(config: dict[str, Any]) -> Clock | None:
    if not config.get("clock"):
        return None
    from privinf.local.clock import Clock

    return Clock()


def _serve(role: str, parent: Parent, config: dict[str, Any]) -> None:
    """Server or dealer: serve until standard input ends."""
    options, clock = _options(config), None
    if role == "dealer":
        from privinf.dealer.dealer import DealerService

        service: Any = DealerService(listen="127.0.0.1:0", keys=config["keys"], options=options)
    else:
        from privinf.server.models import open_model
        from privinf.server.server import Server

        lowered = open_model(Path(config["model"]), options.cache)
        more = parent.lines.get()
        if more is None:
            return
        service = Server(lowered, listen="127.0.0.1:0", dealer=more["dealer"], keys=config["keys"], allow_logits=True, options=options)
        if config.get("dump"):
            from privinf.local.probe import dumping

            service.model.probe = dumping(Path(config["dump"]), "server")
        elif clock := _clock(config):
            service.model.probe = clock.begin
    if config.get("watch"):
        from privinf.local.watch import Watch

        Watch(service, parent.emit)
    service.start()
    parent.emit("listening", address=service.address)
    while parent.lines.get() is not None:
        pass
    service.settle(SETTLE_S)
    service.close()
    _finish(parent, service.traffic(), service.counters.ended, clock)


class _Queries:
    """A client that answers one query after the other."""

    def __init__(self, parent: Parent, config: dict[str, Any]) -> None:
        self._parent, self._config, self._clock = parent, config, _clock(config)
        self._links: deque[dict[str, Any]] = deque(maxlen=64)
        self._traffic: dict[str, Any] = {}
        self._dropped: set[int] = set()
        self._running: tuple[int, Client] | None = None
        parent.on_cancel, parent.on_end = self._cancel, self._end

    def _cancel(self, number: int) -> None:
        self._dropped.add(number)
        if (running := self._running) and running[0] == number:
            running[1].close()

    def _end(self) -> None:
        if running := self._running:
            running[1].close()

    def serve(self) -> None:
        """Until standard input ends."""
        self._parent.emit("ready")
        while (query := self._parent.lines.get()) is not None:
            number = query.pop("query")
            try:
                if number not in self._dropped:
                    self._answer(number, query)
            except PrivinfError as error:
                self._parent.emit("error", query=number, failure=Failure.of(error).plain())
            except (BrokenPipeError, KeyboardInterrupt):
                raise
            except Exception as error:
                logging.getLogger("privinf").debug("a query failed", exc_info=True)
                what, remedy = f"a defect in privinf: {type(error).__name__}: {error}", "run again with --debug for the traceback"
                self._parent.emit("error", query=number, failure=Failure(Code.DEFECT, what, remedy=remedy).plain())
            finally:
                self._running = None
        _finish(self._parent, self._traffic, self._links, self._clock)

    def _client(self, number: int) -> Client:
        from privinf.client.client import Client

        last, config = [-1.0], self._config

        def progress(phase: str, share: float) -> None:
            if share in (0.0, 1.0) or share - last[0] > 0.05 or share < last[0]:
                last[0] = share
                self._parent.emit("progress", query=number, phase=phase, share=share)

        made = Client(config["server"], dealer=config.get("dealer"), keys=config["keys"], options=_options(config), progress=progress)
        if config.get("dump"):
            from privinf.local.probe import dumping

            made.peers.probe = dumping(Path(config["dump"]), "client")
        elif self._clock:
            made.peers.probe = self._clock.begin
        return made

    def _answer(self, number: int, query: dict[str, Any]) -> None:
        from privinf.session.report import snapshot

        client, session, emit = self._client(number), None, self._parent.emit
        self._running = number, client
        try:
            session = client.connect()
            if "inputs" in query:
                output = client.run(*(decode_tensor(x) for x in query["inputs"]))
                emit("output", query=number, output=encode_tensor(output))
            else:
                for index, token in _placed(client.generate(**{**query, "sampling": Sampling(**query["sampling"])})):
                    emit("token", query=number, index=index, id=token.id, text=token.text)
                    if number in self._dropped:
                        return
            assert client.result is not None
            self._traffic = client.result["traffic"]
            emit("result", query=number, result=client.result, logits=[encode_tensor(x) for x in client.logits])
        finally:
            client.close()
            for connection in session.lines.dialled if session else ():
                self._links.append(snapshot(connection.peer_role, connection))
            look_through()


def _placed(tokens: Iterable[Any]) -> Iterable[Any]:
    """(index, token) of a list's replies, or of a single reply."""
    return (each if isinstance(each, tuple) else (0, each) for each in tokens)


def main(role: str) -> int:
    """The process; returns its exit code."""
    few_arenas()
    rare_collections()
    parent = Parent()
    # before the configuration is needed, so that the three parties load their libraries side by side
    importlib.import_module(f"privinf.{role}.{role}")
    config = parent.lines.get()
    if config is None:
        return 0
    _log_to(parent, role, config["log_level"])
    try:
        if role == "client":
            _Queries(parent, config).serve()
        else:
            _serve(role, parent, config)
    except PrivinfError as error:
        parent.emit("error", failure=Failure.of(error).plain())
        return error.exit_code
    except BrokenPipeError:
        if scratch := config.get("scratch"):  # the parent was killed, and nobody else removes the keys that it made
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        return 130
    return 0
