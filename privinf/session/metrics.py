"""Counters for Prometheus: bytes, rounds, seconds and counts, by party, peer and phase; none depends on what a prompt or a reply says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from privinf.session.service import REASONS, Service
from privinf.transport.listener import parse_address
from privinf.transport.meter import Cell
from protocols.errors import ConfigError

Families = Callable[[], Iterable[Metric]]


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


def serve_metrics(address: str, families: Families) -> tuple[str, Callable[[], None]]:
    """Serves `http://ADDRESS/metrics` in a thread; the actual address, and what ends it. ConfigError if it cannot listen there."""
    host, port = parse_address(address)
    try:
        server: Any
        server, thread = start_http_server(port, addr=host, registry=registry_of(families))
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {address}: {error.strerror or error}", remedy="choose another --metrics") from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return f"{host}:{server.server_port}", close
