"""`privinf doctor`: is this machine ready."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Check the installation, the devices, the clock, the certificates and the peers.

    Prints one line a check. The first failure decides the exit code; with
    --json a failure leaves standard output empty, as for every verb.

    Example: privinf doctor --keys keys/client --server s.example.org:7000 --dealer d.example.org:7001
    """
    from privinf.party.doctor import checks
    from privinf.party.options import default_cache

    common.check_timeout(timeout)
    found = []
    for check in checks(cache=cache or default_cache(), keys=keys, server=server, dealer=dealer, device=device, timeout=timeout):
        found.append(check)
        if not as_json:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", flush=True)
    failed = [check for check in found if not check.ok]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise _Finding(f"{failed[0].name}: {failed[0].detail}{more}", failed[0].exit_code)
    if as_json:
        common.write_json({"ok": True, "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in found]})
