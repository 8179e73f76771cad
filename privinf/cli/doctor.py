"""`privinf doctor`: is this machine ready."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import check_times
from privinf.session.options import Runtime
from privinf.setting import Setting


@expand(without=("link",))
def doctor(
    *,
    keys: Annotated[Path | None, Setting("Check these certificates.", "DIR")] = None,
    server: Annotated[str | None, Setting("Check that this server answers.", "HOST:PORT")] = None,
    dealer: Annotated[str | None, Setting("Check that this dealer answers.", "HOST:PORT")] = None,
    gateway: Annotated[str | None, Setting("Check that this gateway answers.", "HOST:PORT")] = None,
    api_key: Annotated[str | None, Setting(f"Check that the gateway takes it; default: ${common.KEY_VARIABLE}.", "KEY")] = None,
    expect: Annotated[str | None, Setting("The model that they are to have.", "ID")] = None,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Check the installation, the devices, the clock, the certificates and the peers.

    With a server it also asks for a session, without a query, so that the
    server has to reach its dealer. Prints one line a check. The first failure
    decides the exit code; with --json a failure leaves standard output empty,
    as for every verb.

    Example: privinf doctor --keys keys/client --server s.example.org:7000 --dealer d.example.org:7001
    """
    from privinf.cli.screen import Screen
    from privinf.doctor.checks import checks

    check_times(runtime)
    here: dict[str, Any] = {"cache": runtime.cache, "device": runtime.device, "timeout": runtime.timeout, "connect_s": runtime.connect_s}
    found = []
    key = api_key if api_key is not None else os.environ.get(common.KEY_VARIABLE)
    peers: dict[str, Any] = {"server": server, "dealer": dealer, "gateway": gateway, "api_key": key, "expect": expect}
    with Screen(quiet=as_json) as screen:
        for check in checks(keys=keys, waiting=screen.waiting, **here, **peers):
            found.append(check)
            screen.stop()
            if not as_json:
                print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", flush=True)
    failed = [check for check in found if not check.ok]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise failed[0].kind(f"{failed[0].name}: {failed[0].detail}{more}")
    if as_json:
        common.write_json({"ok": True, "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in found]})
