"""`privinf serve`: the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.cli import common


def serve(
    model: common.Model,
    listen: common.Listen,
    dealer: common.DealerAddress,
    keys: common.Keys,
    allow_logits: Annotated[bool, typer.Option("--allow-logits", help="Grant rounded logits to clients that ask for them.")] = False,
    clients: Annotated[
        Path | None, typer.Option("--clients", metavar="FILE", help="Serve these certificates alone: fingerprints, one a line.")
    ] = None,
    metrics: common.Metrics = None,
    keep_queries: Annotated[int, typer.Option("--keep-queries", metavar="N", min=0, help="Prepared queries kept for one client.")] = 64,
    keep_bytes: Annotated[int, typer.Option("--keep-bytes", metavar="B", min=0, help="Bytes of them.")] = 4 * 2**30,
    sessions: common.Sessions = 64,
    client_sessions: common.ClientSessions = None,
    session_tokens: Annotated[
        int, typer.Option("--session-tokens", metavar="N", min=0, help="Tokens of prompt and reply in one session; 0: the context's.")
    ] = 0,
    session_bytes: Annotated[
        int, typer.Option("--session-bytes", metavar="B", min=0, help="Bytes between client and server in one session; 0: no limit.")
    ] = 0,
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", min=0, help="Outputs (tokens) for one client in a window of hours; 0: no limit.")
    ] = 0,
    budget_hours: Annotated[float, typer.Option("--budget-hours", metavar="H", help="The hours of such a window.")] = 24.0,
    setups: Annotated[
        int, typer.Option("--setups", metavar="N", min=0, help="Set-ups that one certificate is sent in a window of hours; 0: no limit.")
    ] = 16,
    setup_hours: Annotated[float, typer.Option("--setup-hours", metavar="H", help="The hours of such a window.")] = 24.0,
    idle: common.Idle = 3600.0,
    drain: common.Drain = common.DRAIN_S,
    link: common.LinkName = None,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    connect_timeout: common.ConnectTimeout = common.CONNECT_S,
    cache: common.Cache = None,
    log: common.LogLevel = "info",
    as_json: common.Json = False,
) -> None:
    """Be the server: answer clients with a model that they never see.

    It serves until Ctrl-C or SIGTERM, and says where it listens. On SIGHUP it
    reads its certificate and the list of clients anew. With --budget a client
    gets so many outputs in each window, whichever sessions they are in.

    Example: privinf serve models/pylib --listen 0.0.0.0:7000 --dealer d.example.org:7001 --keys keys/server
    """
    limits: dict[str, Any] = {"keep_queries": keep_queries, "keep_bytes": keep_bytes, "idle": idle, "drain": drain}
    limits |= {"sessions": sessions, "client_sessions": client_sessions, "budget": budget, "budget_hours": budget_hours}
    limits |= {"setups": setups, "setup_hours": setup_hours, "session_tokens": session_tokens, "session_bytes": session_bytes}
    options = common.make_options(timeout=timeout, connect_timeout=connect_timeout, link=link, device=device, cache=cache, **limits)
    from privinf.cli.services import serve_until_stopped
    from privinf.server.models import open_model
    from privinf.server.server import Server
    from privinf.session.memory import few_arenas
    from privinf.session.outlet import unblocked

    few_arenas()
    common.log_from(log)
    lowered = open_model(model, options.cache)
    with (
        unblocked(),
        Server(
            lowered, listen=listen, dealer=dealer, keys=str(keys), allow_logits=allow_logits, clients=clients, options=options
        ) as service,
    ):
        about = {"role": "server", "variant": lowered.info.variant, "model": lowered.id, "tokenizer": lowered.tokenizer_id}
        serve_until_stopped(service, about, as_json, metrics=metrics)
