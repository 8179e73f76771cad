"""What may be wrong with an installation, a machine, its certificates or a peer: a list of checks, none of which raises."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import os
import ssl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from privinf.doctor.finding import Check, roles_of, tried
from privinf.session.devices import cuda_devices, cuda_missing, falls_back
from privinf.session.options import CONNECT_S
from privinf.transport.keys import KeyInfo, load_credentials, show_keys
from privinf.transport.listener import Waiting
from privinf.version import VERSION
from protocols import kernels
from protocols.errors import ConfigError, PrivinfError

PACKAGES = ("numpy", "cryptography", "msgspec", "PyYAML", "rich", "typer")
WHOLE = ("pydantic", "safetensors", "tokenizers")
"""What every party but a dealer needs too, beside CrypTen; see `deploy/dealer.txt`."""
SOON_DAYS, PROMPT = 30, 64
_FOUNDED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)  # no clock that is right shows less


def checks(
    *,
    cache: Path,
    keys: Path | None = None,
    server: str | None = None,
    dealer: str | None = None,
    gateway: str | None = None,
    api_key: str | None = None,
    expect: str | None = None,
    device: str = "cpu",
    timeout: float = 60.0,
    connect_s: float = CONNECT_S,
    waiting: Waiting | None = None,
) -> Iterator[Check]:
    """Every check that applies, in an order in which the first failure explains later ones.

    Of a deployment: the server and the dealer each, then both together by a session without a query, then a gateway. `expect` is the
    id of the model that they are to have. `waiting` is told while one cannot be reached.
    """
    yield tried("privinf", lambda: f"{VERSION}, Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}")
    dealers = _dealers(keys)
    yield tried("packages", lambda: _packages(dealers))
    yield tried("torch", _torch)
    yield Check("crypten", True, "not installed, and no dealer needs it") if dealers else tried("crypten", _crypten)
    yield tried("TLS 1.3", _tls)
    yield tried("cpu", _cpu)
    why = cuda_missing()
    yield Check("cuda", device != "cuda" or not why, why or "; ".join([*cuda_devices(), *filter(None, [falls_back(device)])]))
    yield tried("kernels", lambda: _kernels(cache))
    if not dealers:
        yield tried("speed", lambda: _speed(cache, device))
    yield tried("cache", lambda: _writable(cache))
    infos: list[KeyInfo] = []
    if keys is not None:
        try:
            infos = show_keys(keys)
        except PrivinfError as error:
            yield Check("certificates", False, str(error))
    yield _clock(infos)
    for info in infos:
        yield _certificate(info)
    if keys is not None and infos:
        yield tried("keys", lambda: _loadable(keys))
    if dealers and (server or dealer or gateway):
        yield Check("peers", False, "a dealer's installation has no client to ask them with; do that where privinf is installed whole")
    elif server or dealer or gateway:
        from privinf.doctor.deployment import Deployment  # not before torch and the packages were looked at

        yield from Deployment(keys, timeout, connect_s, expect, cache, waiting).checks(server, dealer, gateway, api_key)


def _dealers(keys: Path | None) -> bool:
    """Whether this is a dealer's installation: nothing that only the others need is there, nor a bundle of another's."""
    for name in ("crypten", "safetensors", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return False
    try:
        return keys is None or "dealer" in roles_of(keys)
    except PrivinfError:
        return True


def _packages(dealers: bool) -> str:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (*PACKAGES, *(() if dealers else WHOLE)))
    return f"{found}: what a dealer needs, and no other party" if dealers else found


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _crypten() -> str:
    importlib.import_module("privinf.crypten_adapter")
    return f"{importlib.metadata.version('crypten')}, imports on this torch"


def _tls() -> str:
    if not ssl.HAS_TLSv1_3:
        raise ConfigError("this Python's OpenSSL has no TLS 1.3", remedy="use a Python that is linked with OpenSSL 1.1.1 or later")
    return "available"


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{cores} cores, {memory / 2**30:.1f} GiB of memory"


def _kernels(cache: Path) -> str:
    """Compiled or not, it works: what they are is what is to be known."""
    kernels.load(cache / "kernels")
    return kernels.status()


def _speed(cache: Path, device: str) -> str:
    """What is kept of it: measuring takes longer than all other checks."""
    from privinf.server.models import open_model  # not before torch and the packages were looked at
    from privinf.session.pace import in_words, kept, seconds
    from privinf.shipped import shipped_model

    found = kept(cache, device, kernels.status())
    if found is None:
        return "not measured; `privinf explain MODEL --seq N --link loopback` does, once"
    try:
        lowered = open_model(shipped_model(), cache)
    except ConfigError:  # an installation without it
        return found.speeds()
    return f"{found.speeds()}; the shipped model over loopback, of {PROMPT} tokens: {in_words(seconds(lowered, found, None, PROMPT))}"


def _writable(cache: Path) -> str:
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ConfigError(f"{cache} cannot be written: {error.strerror}", remedy="give another --cache") from None
    free = os.statvfs(cache)
    return f"{cache}, {free.f_bavail * free.f_frsize / 2**30:.1f} GiB free"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _clock(infos: list[KeyInfo]) -> Check:
    now = _now()
    shown = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < _FOUNDED:
        return Check("clock", False, f"{shown} is in the past; set the clock")
    early = [info for info in infos if info.not_before > now]
    if early:
        return Check(
            "clock",
            False,
            f"{shown} is before the {early[0].role}'s certificate was made, {early[0].not_before:%Y-%m-%d %H:%M}; set the clock",
        )
    return Check("clock", True, shown)


def _certificate(info: KeyInfo) -> Check:
    days = (info.not_after - _now()).total_seconds() / 86400
    name = f"certificate of the {info.role}" if info.role != "none" else f"certificate {info.path}"
    if info.role == "none":
        return Check(name, False, "carries no role; make it by `privinf keys init`")
    if days < 0:
        return Check(name, False, f"expired {-days:.0f} days ago; run `privinf keys renew` where the CA is, and carry the new bundle over")
    soon = "; run `privinf keys renew` soon" if days < SOON_DAYS else ""
    return Check(name, True, f"{days:.0f} days left{soon}")


def _loadable(keys: Path) -> str:
    roles = roles_of(keys)
    for role in roles:
        load_credentials(keys, role)
    return f"complete for {', '.join(roles)}"
