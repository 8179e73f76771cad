"""`privinf dealer`: the dealer."""

from __future__ import annotations

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import SERVICE, Keys, Listen, Log, Metrics, make_options
from privinf.session.options import Admission, DealerLimits, Ending, Runtime

ADMISSION = Admission(sessions=128)


@expand(without=("link", "connect_timeout"))
def dealer(
    *,
    listen: Listen,
    keys: Keys,
    metrics: Metrics = None,
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
    certificate anew.

    Example: privinf dealer --listen 0.0.0.0:7001 --keys keys/dealer
    """
    options = make_options(runtime, admission, limits, ending)
    from privinf.cli.services import serve_until_stopped, serving
    from privinf.dealer.dealer import DealerService

    with serving(log), DealerService(listen=listen, keys=str(keys), options=options) as service:
        serve_until_stopped(service, {"role": "dealer"}, as_json, metrics=metrics)
