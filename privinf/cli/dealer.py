"""`privinf dealer`: the dealer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from privinf.cli import common


def dealer(
    listen: common.Listen,
    keys: common.Keys,
    metrics: common.Metrics = None,
    sessions: common.Sessions = 128,
    client_sessions: common.ClientSessions = None,
    server_sessions: Annotated[
        int | None,
        typer.Option("--server-sessions", metavar="N", min=0, help="Of them, of one server's; 0: no limit; default: three quarters."),
    ] = None,
    memory: Annotated[
        int, typer.Option("--memory", metavar="B", min=1, help="Bytes that a session may hold at a time, the masks of its model included.")
    ] = 8 * 2**30,
    idle: common.Idle = 3600.0,
    drain: common.Drain = common.DRAIN_S,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    cache: common.Cache = None,
    log: common.LogLevel = "info",
    as_json: common.Json = False,
) -> None:
    """Be the dealer: hand out correlated randomness to pairs of parties.

    Run it on a machine that belongs to neither the server's owner nor the
    client. It serves until Ctrl-C or SIGTERM. On SIGHUP it reads its
    certificate anew.

    Example: privinf dealer --listen 0.0.0.0:7001 --keys keys/dealer
    """
    limits: dict[str, Any] = {
        "sessions": sessions,
        "client_sessions": client_sessions,
        "server_sessions": server_sessions,
        "memory": memory,
        "idle": idle,
        "drain": drain,
    }
    options = common.make_options(timeout=timeout, device=device, cache=cache, **limits)
    from privinf.cli.services import serve_until_stopped
    from privinf.dealer.dealer import DealerService
    from privinf.session.memory import few_arenas
    from privinf.session.outlet import unblocked

    few_arenas()
    common.log_from(log)
    with unblocked(), DealerService(listen=listen, keys=str(keys), options=options) as service:
        serve_until_stopped(service, {"role": "dealer"}, as_json, metrics=metrics)
