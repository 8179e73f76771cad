"""A service's own certificate, and the list of those that it serves."""

from __future__ import annotations

from pathlib import Path

from privinf.transport.connection import Connection
from privinf.transport.keys import load_credentials
from protocols.errors import ConfigError


class Papers:
    """From the directory `keys` and a file of fingerprints; without one whoever has a certificate of the CA is served. ConfigError."""

    def __init__(self, keys: str, role: str, clients: Path | None) -> None:
        self._keys, self._role, self._file = keys, role, clients
        self._listed = None if clients is None else read_clients(clients)
        self.credentials = load_credentials(keys, role)

    def renewed(self) -> Papers:
        """The same, read anew."""
        return Papers(self._keys, self._role, self._file)

    def knows(self, connection: Connection) -> bool:
        """Whether this peer is served."""
        return connection.peer_role != "client" or self._listed is None or connection.peer_fingerprint in self._listed


def read_clients(path: Path) -> frozenset[str]:
    """Certificates' fingerprints, one a line, as `keys show` has them; what follows a # is a comment. ConfigError names the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    found = set()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip().lower().replace(":", "")
        if text and (len(text) != 64 or set(text) - set("0123456789abcdef")):
            raise ConfigError(
                f"{path}: line {number} is no fingerprint", remedy="copy the sha256 that `privinf keys show` has for the client"
            )
        found |= {text} if text else set()
    return frozenset(found)
