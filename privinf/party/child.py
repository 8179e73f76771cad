"""One party of a local session, as a process: `python -m privinf _party ROLE`, driven over its standard input and output.

One JSON object a line. The first line on standard input is the configuration; a client gets its queries there too. Events go
to standard output. The end of standard input ends the process, so that no party outlives the one who started it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privinf.party.options import Options
from protocols.errors import PrivinfError

if TYPE_CHECKING:
    from privinf.party.clock import Clock


def _options(config: dict[str, Any]) -> Options:
    return Options(**{**config["options"], "cache": Path(config["options"]["cache"])})


def emit(event: str, **values: Any) -> None:
    """One event for the parent."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


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


def _finish(traffic: dict[str, Any], links: Iterable[dict[str, Any]], clock: Clock | None) -> None:
    """`links` are the meters' snapshots of the last connections, `clock` the seconds of each pass where they were asked for."""
    from privinf.party.report import peak_rss_bytes

    passes = clock.report() if clock else []
    emit("ended", pid=os.getpid(), peak_rss_bytes=peak_rss_bytes(), traffic=traffic, links=list(links), passes=passes)


def _clock(config: dict[str, Any]) -> Clock | None:
    if not config.get("clock"):
        return None
    from privinf.party.clock import Clock

    return Clock()


def _serve(role: str, config: dict[str, Any]) -> None:
    """Server or dealer: serve until standard input ends."""
    from privinf.party.report import counters

    options, clock = _options(config), None
    if role == "dealer":
        from privinf.party.dealer import DealerService

        service: Any = DealerService(listen="127.0.0.1:0", keys=config["keys"], options=options)
    else:
        from privinf.party.server import Server

        service = Server(
            config["model"], listen="127.0.0.1:0", dealer=config["dealer"], keys=config["keys"], allow_logits=True, options=options
        )
        if config.get("dump"):
            from privinf.party.probe import dumping

            service.probe = dumping(Path(config["dump"]), "server")
        elif clock := _clock(config):
            service.probe = clock.begin
    service.start()
    emit("listening", address=service.address)
    sys.stdin.read()
    service.close()
    _finish({phase: counters(cell) for phase, cell in service.traffic().items()}, service.ended, clock)


def _client(config: dict[str, Any]) -> None:
    """Client: one line of standard input is one query."""
    from privinf.party.client import Client

    last, clock = [-1.0], _clock(config)

    def progress(phase: str, share: float) -> None:
        if share in (0.0, 1.0) or share - last[0] > 0.05 or share < last[0]:
            last[0] = share
            emit("progress", phase=phase, share=share)

    def make() -> Client:
        made = Client(config["server"], dealer=config["dealer"], keys=config["keys"], options=_options(config), progress=progress)
        if config.get("dump"):
            from privinf.party.probe import dumping

            made.probe = dumping(Path(config["dump"]), "client")
        elif clock:
            made.probe = clock.begin
        return made

    traffic: dict[str, Any] = {}
    links: deque[dict[str, Any]] = deque(maxlen=64)
    emit("ready")
    for line in sys.stdin:
        query = json.loads(line)
        client, session = make(), None
        try:
            session = client.connect()
            if "inputs" in query:
                output = client.run(*(decode_tensor(x) for x in query["inputs"]))
                emit("output", output=encode_tensor(output))
            else:
                for token in client.generate(**query):
                    emit("token", id=token.id, text=token.text)
            assert client.result is not None
            traffic = client.result["traffic"]
            emit("result", result=client.result, logits=[encode_tensor(x) for x in client.logits])
        except PrivinfError as error:
            emit("error", kind=type(error).__name__, message=str(error), exit_code=error.exit_code)
        finally:
            client.close()
            for peer, connection in (("server", session.connection), ("dealer", session.link)) if session else ():
                if connection is not None:
                    links.append({"peer": peer, **connection.meter.snapshot()})
    _finish(traffic, links, clock)


def main(role: str) -> int:
    """The process; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format=f"{role}: %(message)s", stream=sys.stderr)
    config = json.loads(sys.stdin.readline() or "{}")
    if threads := config.get("threads"):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded
    try:
        if role == "client":
            _client(config)
        else:
            _serve(role, config)
    except PrivinfError as error:
        emit("error", kind=type(error).__name__, message=str(error), exit_code=error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        threading.Timer(5.0, os._exit, (1,)).start() if threading.active_count() > 1 else None
    return 0
