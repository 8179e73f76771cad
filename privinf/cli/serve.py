"""`privinf serve`: the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import SERVICE, Embedding, Keys, Listen, Log, MaybeDealer, Metrics, Model, Trust, make_options
from privinf.session.options import Admission, Ending, Holding, PoolLimits, Quotas, Runtime
from privinf.setting import Setting
from privinf.trust import DEALER


@expand()
def serve(
    *,
    model: Model,
    listen: Listen,
    dealer: MaybeDealer = None,
    keys: Keys,
    trust: Trust = DEALER,
    embedding: Embedding = None,
    allow_logits: Annotated[bool, Setting("Grant rounded logits to clients that ask for them.")] = False,
    clients: Annotated[Path | None, Setting("Serve these certificates alone: fingerprints, one a line.", "FILE")] = None,
    metrics: Metrics = None,
    pool: PoolLimits,
    admission: Admission,
    quotas: Quotas,
    holding: Holding,
    ending: Ending = SERVICE,
    runtime: Runtime,
    log: Log = "info",
    as_json: common.Json = False,
) -> None:
    """Be the server: answer clients with a model that they never see.

    It serves until Ctrl-C or SIGTERM, and says where it listens. On SIGHUP it
    reads its certificate and the list of clients anew. With --budget a client
    gets so many outputs in each window, whichever sessions they are in. With
    --trust two-party it needs no dealer.

    Example: privinf serve models/pylib --listen 0.0.0.0:7000 --dealer d.example.org:7001 --keys keys/server
    """
    options = make_options(runtime, pool, admission, quotas, holding, ending, trust=trust, embedding=embedding)
    from privinf.cli.services import serve_until_stopped, serving
    from privinf.server.models import open_model
    from privinf.server.server import Server

    with serving(log):
        lowered = open_model(model, options.cache)
        names = {"model": lowered.id, "tokenizer": lowered.tokenizer_id, "trust": trust}
        about = {"role": "server", "variant": lowered.info.variant, **names}
        party: dict[str, Any] = {"listen": listen, "dealer": dealer, "keys": str(keys), "allow_logits": allow_logits, "clients": clients}
        with Server(lowered, options=options, **party) as service:
            serve_until_stopped(service, about, as_json, metrics=metrics)
