"""A worker: a service like any other, but that it is handed its connections, and told by the front when to end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import Metric

from privinf.session.metrics import service_families
from privinf.session.service import Service
from privinf.workers.words import Line
from protocols.errors import ConfigError


def work(make: Callable[[], Service], line: Line) -> None:
    """Serves until the front says otherwise, or is gone."""
    with make() as service:
        ending: threading.Thread | None = None
        line.say(up=os.getpid())
        while not line.ended:
            for word in line.heard(60.0):
                if word["do"] == "look":
                    threading.Thread(target=_look, args=(service, line, word["number"]), daemon=True).start()
                elif word["do"] == "reload":
                    _reload(service)
                elif word["do"] == "drain" and ending is None:
                    ending = threading.Thread(target=_end, args=(service, line, word["seconds"]), daemon=True)
                    ending.start()
                elif word["do"] == "stop":
                    service.close()
                    _bye(service, line)
                    return
                elif word["do"] == "leave":
                    return


def _look(service: Service, line: Line, number: int) -> None:
    line.say(looked=number, ready=service.ready(), families=packed(service_families(service)))


def _reload(service: Service) -> None:
    try:
        service.reload()
    except ConfigError as error:
        logging.getLogger(f"privinf.{service.role}").error("the keys were not read anew, and the old ones stay: %s", error)


def _end(service: Service, line: Line, seconds: float) -> None:
    """Those at the door come in first: nobody is handed to this worker any more."""
    began = time.monotonic()
    service.last_call(seconds / 2)
    service.drain(began + seconds - time.monotonic())
    service.close()
    _bye(service, line)


def _bye(service: Service, line: Line) -> None:
    """The last numbers; the front answers that this process may leave."""
    line.say(bye=True, families=packed(service_families(service)))


def packed(families: Iterable[Metric]) -> list[list[Any]]:
    """As JSON: name, help, type, and the samples' names, labels and values."""
    return [[each.name, each.documentation, each.type, [[s.name, s.labels, s.value] for s in each.samples]] for each in families]
