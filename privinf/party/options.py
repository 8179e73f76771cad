"""What a person may set for a session, in one frozen object."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from privinf.party.devices import check_device
from privinf.transport.shaper import Link, parse_link
from protocols.errors import ConfigError

MAX_NEW_TOKENS = 32
IDLE_S = 3600.0  # how long a session may lie unused
REACH_S = 5.0  # how long a dealer that is due to run may refuse connections


def default_cache() -> Path:
    """The user's cache directory for this program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "privinf"


@dataclass(frozen=True)
class Options:
    """Common to all parties; seconds, and paths. `link` is an emulated link between server and client.

    Of the client alone: a prompt goes through passes of at most `chunk` positions, and the server sees multiples of `pad_prompt` and
    of `pad_reply` in place of the numbers of prompt tokens and of new ones; 0: neither.

    ConfigError where `device` (`cpu` or `cuda`) is not here, and for a number below 0.
    """

    timeout: float = 60.0
    link: str | None = None
    device: str = "cpu"
    cache: Path = field(default_factory=default_cache)
    expect: str | None = None
    keep_queries: int = 64  # prepared, of one client, at a server
    keep_bytes: int = 4 * 2**30  # of them
    chunk: int = 0
    pad_prompt: int = 0
    pad_reply: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", Path(self.cache))
        check_device(self.device)
        for name in ("chunk", "pad_prompt", "pad_reply"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} is not a whole number from 0 on", remedy="give a number of tokens, or leave it out")

    @property
    def emulated(self) -> Link | None:
        """The parsed link, ConfigError if it is malformed."""
        return parse_link(self.link) if self.link else None
