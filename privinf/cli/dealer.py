"""`privinf dealer`: the dealer."""

from __future__ import annotations

from typing import Annotated

import typer

from privinf.cli import common


def dealer(
    listen: common.Listen,
    keys: common.Keys,
    metrics: common.Metrics = None,
    sessions: common.Sessions = 64,
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
    options = common.make_options(timeout=timeout, device=device, cache=cache, sessions=sessions, memory=memory, idle=idle, drain=drain)
    from privinf.cli.services import serve_until_stopped
    from privinf.party.dealer import DealerService
    from privinf.party.memory import few_arenas

    few_arenas()
    common.log_from(log)
    with DealerService(listen=listen, keys=str(keys), options=options) as service:
        serve_until_stopped(service, {"role": "dealer"}, as_json, metrics=metrics)
