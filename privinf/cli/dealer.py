"""`privinf dealer`: the dealer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import SERVICE, Engine, Keys, Listen, Log, Metrics, Workers, make_options
from privinf.session.options import Admission, DealerLimits, Ending, Runtime

if TYPE_CHECKING:
    from privinf.workers.nursery import Nursed

ADMISSION = Admission(sessions=128)


@expand(without=("link", "connect_timeout"))
def dealer(
    *,
    listen: Listen,
    keys: Keys,
    metrics: Metrics = None,
    workers: Workers = 1,
    cluster: Engine,
    admission: Admission = ADMISSION,
    limits: DealerLimits,
    ending: Ending = SERVICE,
    runtime: Runtime,
    log: Log = "info",
    as_json: common.Json = False,
) -> None:
    """Be the dealer: hand out correlated randomness to pairs of parties.

    Run it on a machine that belongs to neither the server's owner nor the
    client. It serves until Ctrl-C or SIGTERM. On SIGHUP it reads its
    certificate anew. With --workers several processes serve, and on SIGHUP
    they are replaced one by one, with all read anew. With --engine ray the
    workers are actors on a Ray cluster, whose machines are the dealer then.

    Example: privinf dealer --listen 0.0.0.0:7001 --keys keys/dealer
    """
    options = make_options(runtime, admission, limits, ending)
    from privinf.cli.services import serve_in_workers, serve_until_stopped, serving

    def load() -> Nursed:
        from privinf.dealer.dealer import DealerService
        from privinf.workers.nursery import Nursed, prepare

        prepare(options, str(keys), "dealer")
        about = {"role": "dealer"}
        return Nursed(
            about, lambda end, board: DealerService(listen=end, keys=str(keys), options=options, board=board), lambda: serving(log)
        )

    if cluster.engine == "ray":
        from privinf.dealer.farm import FarmedDealer
        from privinf.session.cluster import aside

        where: dict[str, Any] = {"workers": workers, "ray_address": cluster.ray_address}
        with serving(log), aside() as out, FarmedDealer(listen=listen, keys=str(keys), options=options, **where) as farmed:
            serve_until_stopped(farmed, {"role": "dealer", "engine": "ray", "workers": workers}, as_json, metrics=metrics, out=out)
        return
    if workers > 1:
        serve_in_workers(load, role="dealer", listen=listen, workers=workers, options=options, metrics=metrics, as_json=as_json, late=True)
        return
    from privinf.dealer.dealer import DealerService

    with serving(log), DealerService(listen=listen, keys=str(keys), options=options) as service:
        serve_until_stopped(service, {"role": "dealer"}, as_json, metrics=metrics)
