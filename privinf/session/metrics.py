"""Counters for Prometheus: bytes, rounds, seconds and counts, by party, peer and phase; none depends on what a prompt or a reply says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler

from privinf.session.service import REASONS, Service
from privinf.transport.listener import format_address, parse_address
from privinf.transport.meter import Cell
from protocols.errors import ConfigError

Families = Callable[[], Iterable[Metric]]
ASKED_S = 10.0
"""How long somebody may take to ask."""


def traffic_families(role: str, cells: Mapping[tuple[str, str], Cell]) -> list[Metric]:
    """What moved over the sockets of the party `role`, from cells by (peer's role, phase)."""
    moved = CounterMetricFamily("privinf_bytes", "Bytes on the sockets, TLS included.", labels=["role", "peer", "phase", "direction"])
    payload = CounterMetricFamily("privinf_payload_bytes", "Protocol elements.", labels=["role", "peer", "phase", "direction"])
    rounds = CounterMetricFamily("privinf_rounds", "Rounds of messages that depend on each other.", labels=["role", "peer", "phase"])
    for (peer, phase), cell in cells.items():
        moved.add_metric([role, peer, phase, "sent"], cell.sent)
        moved.add_metric([role, peer, phase, "received"], cell.received)
        payload.add_metric([role, peer, phase, "sent"], cell.payload_sent)
        payload.add_metric([role, peer, phase, "received"], cell.payload_received)
        rounds.add_metric([role, peer, phase], cell.rounds)
    return [moved, payload, rounds]


def counter(name: str, about: str, value: float, **labels: str) -> Metric:
    """One counter."""
    family = CounterMetricFamily(name, about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def gauge(name: str, about: str, value: float, **labels: str) -> Metric:
    """One gauge."""
    family = GaugeMetricFamily(name, about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def service_families(service: Service) -> Iterable[Metric]:
    """Of a server or a dealer."""
    role, counts = service.role, service.counters.counts
    yield from traffic_families(role, service.counters.cells())
    yield counter("privinf_passes", "Passes that were run or dealt for.", counts["passes"], role=role)
    yield counter("privinf_positions", "Positions of prompts and replies that went through them.", counts["positions"], role=role)
    yield counter("privinf_correlations", "Correlations that were spent or dealt, each once.", counts["correlations"], role=role)
    yield gauge("privinf_peers", "Peers that are served now.", service.peers, role=role)
    yield gauge("privinf_peers_limit", "Peers that are served at a time.", service.options.sessions, role=role)
    yield gauge("privinf_draining", "Whether nobody new is served, because it is to end.", service.draining, role=role)
    yield gauge("privinf_turns_waiting", "Sessions that wait for their turn to compute.", service.turns.waiting, role=role)
    yield counter("privinf_turns", "Turns that sessions had.", service.turns.given, role=role)
    refusals = CounterMetricFamily("privinf_refusals", "Peers, or requests of theirs, that were refused.", labels=["role", "reason"])
    for reason in REASONS:
        refusals.add_metric([role, reason], service.counters.refusals[reason])
    yield refusals
    spent = CounterMetricFamily(
        "privinf_budget_outputs", "Outputs that were spent of budgets, by the name of the client.", labels=["client"]
    )
    for client, count in service.budgets().items():
        spent.add_metric([client], count)
    yield spent


class _Collector:
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


def registry_of(families: Families) -> CollectorRegistry:
    """A registry of its own, whose values are read when it is scraped."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(families))
    return registry


class _Probed(MetricsHandler):
    """Prometheus's own answer at `/metrics`, and one line each at the two places that probes ask."""

    timeout = ASKED_S
    ready: Callable[[], str]

    def do_GET(self) -> None:
        """`/healthz` says that the process lives; `/readyz` says 503 and why, where nobody new could be served."""
        path = self.path.partition("?")[0]
        if path in ("/metrics", "/"):
            super().do_GET()
        elif path == "/healthz":
            self._say(200, "ok")
        elif path == "/readyz":
            why = type(self).ready()
            self._say(503 if why else 200, why or "ok")
        else:
            self._say(404, "there are /metrics, /healthz and /readyz")

    def _say(self, status: int, line: str) -> None:
        body = f"{line}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that went away is nothing to tell."""


def serve_metrics(address: str, families: Families, ready: Callable[[], str] = lambda: "") -> tuple[str, Callable[[], None]]:
    """Serves `/metrics`, `/healthz` and `/readyz` over HTTP in a thread; the actual address, and what ends it.

    `ready` says why nobody new could be served. ConfigError if it cannot listen there.
    """
    host, port = parse_address(address)
    kind = type("Probed", (_Probed,), {"registry": registry_of(families), "ready": staticmethod(ready)})
    server_kind = type("Http", (_Http,), {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
    try:
        server = server_kind((host, port), kind)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {address}: {error.strerror or error}", remedy="choose another --metrics") from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return format_address(host, server.server_port), close
