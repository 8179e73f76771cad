"""What `serve`, `dealer` and `gateway` have in common, being processes that are services and nothing else."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from privinf.cli import common
from privinf.cli.signals import Stopped, allow, listen_again
from protocols.errors import ConfigError


@contextlib.contextmanager
def serving(level: str | None = None) -> Iterator[None]:
    """Within it memory goes back and lines hold nobody up. Shows what a party logs from the level on, if one is given; with --debug all."""
    from privinf.session.memory import few_arenas
    from privinf.session.outlet import unblocked

    few_arenas()
    if level is not None and logging.getLogger().level > logging.DEBUG:
        logging.getLogger("privinf").setLevel(level.upper())
    with unblocked():
        yield


def serve_until_stopped(service: Any, about: dict[str, Any], as_json: bool, *, metrics: str | None = None) -> None:
    """Says where it listens, then waits for a signal, which is how a service ends: exit code 0. SIGHUP makes it read its keys anew.

    Where its options allow for a drain, sessions may end by themselves first; a second signal ends them.
    """
    model = f" with {about['variant']}, id {about['model']}, {common.tokenizer_line(about['tokenizer'])}" if "model" in about else ""

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
                from privinf.session.metrics import serve_metrics, service_families

                about["metrics"], close = serve_metrics(metrics, lambda: service_families(service))
                stack.callback(close)
                print(f"{about['role']} answers Prometheus on http://{about['metrics']}/metrics", file=sys.stderr, flush=True)
            print(f"{about['role']} listens on {service.address}{model}", file=sys.stderr, flush=True)
            if as_json:
                common.write_json({**about, "address": service.address})
            while True:  # not `signal.pause`, which does not see a signal that came just before it
                time.sleep(0.5)
        except Stopped:
            _drain(service, about["role"])
            print(f"{about['role']} stops", file=sys.stderr, flush=True)


def _drain(service: Any, role: str) -> None:
    seconds = service.options.drain
    if not seconds or not service.peers:
        return
    with contextlib.suppress(Stopped):
        listen_again()
        print(f"{role} takes nobody new, and stops in {seconds:g} s at the latest", file=sys.stderr, flush=True)
        service.drain(seconds)
