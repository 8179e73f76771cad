"""`privinf serve`: the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import SERVICE, Embedding, Keys, Listen, Log, MaybeDealer, Metrics, Model, Trust, Workers, make_options
from privinf.session.options import Admission, Ending, Holding, PoolLimits, Quotas, Runtime
from privinf.setting import Setting
from privinf.trust import DEALER

if TYPE_CHECKING:
    from privinf.lowering.lowered import Lowered
    from privinf.workers.nursery import Nursed


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
    workers: Workers = 1,
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
    --trust two-party it needs no dealer. With --workers several processes
    serve, and on SIGHUP they are replaced one by one, with all read anew.

    Example: privinf serve models/pylib --listen 0.0.0.0:7000 --dealer d.example.org:7001 --keys keys/server
    """
    options = make_options(runtime, pool, admission, quotas, holding, ending, trust=trust, embedding=embedding)
    party: dict[str, Any] = {"dealer": dealer, "keys": str(keys), "allow_logits": allow_logits, "clients": clients, "options": options}

    def about(lowered: Lowered) -> dict[str, Any]:
        names = {"model": lowered.id, "tokenizer": lowered.tokenizer_id, "trust": trust}
        return {"role": "server", "variant": lowered.info.variant, **names}

    def load() -> Nursed:
        from privinf.server.models import Loaded, open_model
        from privinf.server.server import Server, check_dealer
        from privinf.workers.nursery import Nursed, prepare

        check_dealer(dealer, options)
        prepare(options, str(keys), "server", clients)
        loaded = Loaded(open_model(model, options.cache), options.device)
        return Nursed(about(loaded.lowered), lambda end, board: Server(loaded, listen=end, board=board, **party), lambda: serving(log))

    from privinf.cli.services import serve_in_workers, serve_until_stopped, serving

    if workers > 1:
        serve_in_workers(load, role="server", listen=listen, workers=workers, options=options, metrics=metrics, as_json=as_json)
        return
    from privinf.server.models import open_model
    from privinf.server.server import Server

    with serving(log):
        lowered = open_model(model, options.cache)
        with Server(lowered, listen=listen, **party) as service:
            serve_until_stopped(service, about(lowered), as_json, metrics=metrics)
