"""`privinf keys`: the private CA and the certificates of the three roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.transport.keys import DAYS, HOSTS, KeyInfo, add_client, init_keys, renew_keys, show_keys

app = typer.Typer(
    help="Make, show and renew the certificates by which the parties know each other.\n\nExample: privinf keys init --keys keys"
)

KeysOption = Annotated[Path, typer.Option("--keys", metavar="DIR", help="Directory of the CA and the roles' bundles.")]
HostOption = Annotated[
    list[str] | None, typer.Option("--host", metavar="NAME", help="Host name or address that peers dial; may be given several times.")
]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=3650, help="Validity of the certificates, days.")]
DealerOption = Annotated[bool, typer.Option("--dealer/--no-dealer", help="Whether there is a dealer.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("init")
def init(
    keys: KeysOption, host: HostOption = None, days: DaysOption = DAYS, dealer: DealerOption = True, as_json: JsonOption = False
) -> None:
    """Make a private CA and a certificate for each role, for localhost and the hosts given.

    Example: privinf keys init --keys keys --host server.example.org --host 10.0.0.5

    Carry DIR/server, DIR/client and DIR/dealer to their machines; ca.key stays
    behind. Where the two are alone, --no-dealer makes none for a dealer.
    """
    init_keys(keys, (*HOSTS, *(host or ())), days=days, dealer=dealer)
    _report(show_keys(keys), as_json)


@app.command("add")
def add(
    keys: KeysOption,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the client is called, in its certificate.")],
    days: DaysOption = DAYS,
    as_json: JsonOption = False,
) -> None:
    """Make a further client's certificate, in DIR/clients/NAME.

    Example: privinf keys add alice --keys keys

    Budgets and counters of a server know a client by this name, which stays
    when the certificate is renewed. Carry DIR/clients/NAME to its machine.
    """
    _report(show_keys(add_client(keys, name, days=days)), as_json)


@app.command("show")
def show(keys: KeysOption, as_json: JsonOption = False) -> None:
    """Show the certificates of a directory or of a bundle.

    Example: privinf keys show --keys keys
    """
    _report(show_keys(keys), as_json)


@app.command("renew")
def renew(keys: KeysOption, host: HostOption = None, days: DaysOption = DAYS, as_json: JsonOption = False) -> None:
    """Issue new certificates from the existing CA, for the same hosts, or for localhost and the hosts given.

    Further clients keep their names.

    Example: privinf keys renew --keys keys --host server.example.org
    """
    renew_keys(keys, (*HOSTS, *host) if host else None, days=days)
    _report(show_keys(keys), as_json)


def _report(infos: list[KeyInfo], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"certificates": [_plain(info) for info in infos]}))
        return
    for info in infos:
        hosts = f"  for {', '.join(info.hosts)}" if info.hosts else ""
        state = "EXPIRED" if info.expired else "valid"
        name = info.subject.removeprefix("CN=privinf client ") if info.subject.startswith("CN=privinf client ") else ""
        typer.echo(f"{info.role:<7} {name and name + ' '}{state} until {info.not_after:%Y-%m-%d}  sha256 {info.fingerprint}{hosts}")


def _plain(info: KeyInfo) -> dict[str, Any]:
    return {
        "role": info.role,
        "subject": info.subject,
        "fingerprint": info.fingerprint,
        "not_before": info.not_before.isoformat(),
        "not_after": info.not_after.isoformat(),
        "expired": info.expired,
        "hosts": list(info.hosts),
        "path": str(info.path),
    }
