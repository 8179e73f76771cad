"""By which names a gateway may be called.

A web page elsewhere can point a name of its own at our address, and would then be of one origin with us (DNS rebinding); what it
cannot do is have its requests name another host than its own.
"""

from __future__ import annotations

import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)


def host_of(header: str) -> str | None:
    """The name or address in a `Host` header, without brackets, port and final dot; None if it is none."""
    found = _HOST.fullmatch(header.strip())
    return None if found is None else (found[1] or found[2]).lower().removesuffix(".") or None


def is_ours(host: str, names: frozenset[str], local: str) -> bool:
    """Whether a gateway that goes by `names` may be called so on a connection to the address `local`; as this machine itself, always."""
    if host == "localhost" or host in names:
        return True
    address = _address(host)
    return address is not None and (address.is_loopback or address == _address(local))


def _address(text: str) -> Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
