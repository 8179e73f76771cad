"""`privinf doctor`: is this machine ready."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.cli import common
from protocols.errors import PrivinfError


class _Finding(PrivinfError):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def doctor(
    keys: Annotated[Path | None, typer.Option("--keys", metavar="DIR", help="Check these certificates.")] = None,
    server: Annotated[str | None, typer.Option("--server", metavar="HOST:PORT", help="Check that this server answers.")] = None,
    dealer: Annotated[str | None, typer.Option("--dealer", metavar="HOST:PORT", help="Check that this dealer answers.")] = None,
    gateway: Annotated[str | None, typer.Option("--gateway", metavar="HOST:PORT", help="Check that this gateway answers.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help=f"Check that the gateway takes it; default: ${common.KEY_VARIABLE}.")
    ] = None,
    expect: Annotated[str | None, typer.Option("--expect", metavar="ID", help="The model that they are to have.")] = None,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    connect_timeout: common.ConnectTimeout = common.CONNECT_S,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Check the installation, the devices, the clock, the certificates and the peers.

    With a server it also asks for a session, without a query, so that the
    server has to reach its dealer. Prints one line a check. The first failure decides the exit code; with
    --json a failure leaves standard output empty, as for every verb.

    Example: privinf doctor --keys keys/client --server s.example.org:7000 --dealer d.example.org:7001
    """
    from privinf.cli.screen import Screen
    from privinf.doctor.checks import checks
    from privinf.session.options import default_cache

    limits: dict[str, Any] = {"timeout": timeout, "connect_s": common.check_times(timeout, connect_timeout)}
    found = []
    key = api_key if api_key is not None else os.environ.get(common.KEY_VARIABLE)
    peers: dict[str, Any] = {"server": server, "dealer": dealer, "gateway": gateway, "api_key": key, "expect": expect}
    with Screen(quiet=as_json) as screen:
        for check in checks(cache=cache or default_cache(), keys=keys, device=device, waiting=screen.waiting, **limits, **peers):
            found.append(check)
            screen.stop()
            if not as_json:
                print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", flush=True)
    failed = [check for check in found if not check.ok]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise _Finding(f"{failed[0].name}: {failed[0].detail}{more}", failed[0].exit_code)
    if as_json:
        common.write_json({"ok": True, "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in found]})
