"""What `serve`, `dealer` and `gateway` have in common, being processes that are services and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from privinf.cli import common
from privinf.cli.signals import Stopped, allow, listen_again
from privinf.cli.verbs import COMMAND
from privinf.forking import CHANNEL
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from privinf.session.options import Options
    from privinf.workers.nursery import Nursed


@contextlib.contextmanager
def serving(level: str | None = None) -> Iterator[None]:
    """Within it memory goes back and lines hold nobody up. Shows what a party logs from the level on, if one is given; with --debug all."""
    from privinf.session.memory import few_arenas, rare_collections
    from privinf.session.outlet import unblocked

    few_arenas()
    rare_collections()
    if level is not None and logging.getLogger().level > logging.DEBUG:
        logging.getLogger("privinf").setLevel(level.upper())
    with unblocked():
        yield


def serve_until_stopped(
    service: Any, about: dict[str, Any], as_json: bool, *, metrics: str | None = None, out: TextIO | None = None
) -> None:
    """Says where it listens, then waits for a signal, which is how a service ends: exit code 0. SIGHUP makes it read its keys anew.

    Where its options allow for a drain, sessions may end by themselves first; a second signal ends them.
    """

    def reload(number: int, frame: object) -> None:
        try:
            service.reload()
            print(f"{about['role']} has read its keys anew", file=sys.stderr, flush=True)
        except ConfigError as error:
            logging.getLogger(f"privinf.{about['role']}").error("the keys were not read anew, and the old ones stay: %s", error)

    with contextlib.ExitStack() as stack:
        try:
            signal.signal(signal.SIGHUP, reload)
            allow(service.options.drain)
            if metrics is not None:
                from privinf.session.metrics import service_families

                _answer(stack, about, metrics, lambda: service_families(service), service.ready)
            _say(about, service.address, as_json, out)
            while True:  # not `signal.pause`, which does not see a signal that came just before it
                time.sleep(0.5)
        except Stopped:
            _drain(service, about["role"])
            print(f"{about['role']} stops", file=sys.stderr, flush=True)


def _answer(stack: contextlib.ExitStack, about: dict[str, Any], metrics: str, families: Any, ready: Callable[[], str]) -> None:
    from privinf.session.metrics import serve_metrics

    about["metrics"], close = serve_metrics(metrics, families, ready)
    stack.callback(close)
    print(f"{about['role']} answers Prometheus on http://{about['metrics']}/metrics", file=sys.stderr, flush=True)


def _say(about: dict[str, Any], address: str, as_json: bool, out: TextIO | None = None) -> None:
    model = f" with {about['variant']}, id {about['model']}, {common.tokenizer_line(about['tokenizer'])}" if "model" in about else ""
    unit = "actors of a cluster" if about.get("engine") == "ray" else "processes"
    several = f" in {about['workers']} {unit}" if "workers" in about else ""
    print(f"{about['role']} listens on {address}{several}{model}", file=sys.stderr, flush=True)
    if as_json:
        common.write_json({**about, "address": address}, out)


def serve_in_workers(
    load: Callable[[], Nursed],
    *,
    role: str,
    listen: str,
    workers: int,
    options: Options,
    metrics: str | None,
    as_json: bool,
    late: bool = False,
) -> None:
    """The same, by a process that listens and others that serve; this process is the first, or, started by it, the one that loads.

    On SIGHUP everything is read anew, and one worker after the other is replaced. `late`: sessions have several connections.
    """
    if options.device != "cpu":
        raise ConfigError("several workers share the weights in main memory alone", remedy="leave --workers or --device out")
    if not sys.platform.startswith("linux"):
        raise ConfigError("several workers need Linux", remedy="leave --workers out")
    from privinf.session.board import PEERS
    from privinf.workers.nursery import nurse

    most = PEERS // 2 if late else PEERS  # where a session has two peers
    if options.sessions > most:
        raise ConfigError(f"several workers have room for {most} sessions", remedy="give a smaller --sessions, or leave --workers out")
    if CHANNEL in os.environ:  # a front has started us
        nurse(load)
    from privinf.workers.front import Failed, Front

    with contextlib.ExitStack() as stack:
        front = Front(COMMAND.get(), role=role, listen=listen, workers=workers, looks=late)
        try:
            signal.signal(signal.SIGHUP, lambda number, frame: front.reload())
            allow(options.drain)
            about = {**front.begin(), "workers": workers}
            if metrics is not None:
                _answer(stack, about, metrics, front.families, front.ready)
            _say(about, front.address, as_json)
            while True:
                front.step()
        except Failed as error:
            _end(front, 0.0)
            raise SystemExit(error.code) from None
        except Stopped:
            _end(front, options.drain)
            print(f"{role} stops", file=sys.stderr, flush=True)


def _end(front: Any, seconds: float) -> None:
    with contextlib.suppress(Stopped), front.ending(seconds) as over:
        if seconds and front.peers:
            listen_again()
            print(f"{front.role} takes nobody new, and stops in {seconds:g} s at the latest", file=sys.stderr, flush=True)
        while seconds and not over():
            pass


def _drain(service: Any, role: str) -> None:
    seconds = service.options.drain
    if not seconds or not service.peers:
        return
    with contextlib.suppress(Stopped):
        listen_again()
        print(f"{role} takes nobody new, and stops in {seconds:g} s at the latest", file=sys.stderr, flush=True)
        service.drain(seconds)
