"""A finding, and how one is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from privinf.transport.keys import ROLES, show_keys
from protocols.errors import ConfigError, PrivinfError


@dataclass(frozen=True)
class Check:
    """One finding. `kind` is the error with which a failure ends `privinf doctor`."""

    name: str
    ok: bool
    detail: str
    kind: type[PrivinfError] = ConfigError


def tried(name: str, detail: Callable[[], str]) -> Check:
    """The finding that something works, with what it says of itself, or why it does not; raises nothing."""
    try:
        return Check(name, True, detail())
    except PrivinfError as error:
        return Check(name, False, str(error), type(error))
    except Exception as error:  # whatever an import or a system call comes up with is a finding here
        return Check(name, False, f"{type(error).__name__}: {error}")


def roles_of(keys: Path) -> list[str]:
    """The roles for which a directory of all roles, or a bundle, has a certificate."""
    return [role for role in ROLES if (keys / role / "cert.pem").exists()] or [info.role for info in show_keys(keys) if info.role in ROLES]
