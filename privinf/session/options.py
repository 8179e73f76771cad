"""What a person may set for a session, in one frozen object."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from privinf.session.devices import check_device
from privinf.transport.shaper import Link, parse_link
from protocols.errors import ConfigError

MAX_NEW_TOKENS = 32
LONGEST = 1 << 20  # new tokens of one reply, beyond any model's context
IDLE_S = 3600.0  # how long a session may lie unused
CONNECT_S = 10.0  # how long a party may be away before who dials it gives up

_WHOLE: tuple[str, ...] = ("chunk", "pad_prompt", "pad_reply", "keep_queries", "keep_bytes")
_WHOLE += ("memory", "sessions", "client_sessions", "server_sessions", "session_tokens", "session_bytes", "budget", "setups")


def default_cache() -> Path:
    """The user's cache directory for this program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "privinf"


@dataclass(frozen=True)
class Options:
    """Common to all parties; seconds, and paths. `link` is an emulated link between server and client.

    Of the client alone: a prompt goes through passes of at most `chunk` positions, and the server sees multiples of `pad_prompt` and
    of `pad_reply` in place of the numbers of prompt tokens and of new ones; 0: neither. `expect` is the id that the model must have,
    `expect_tokenizer` the SHA-256 of the tokenizer, and `tokenizer` a `tokenizer.json` in place of the bundle's.

    What a server or a dealer bounds is 0 where it has no bound.

    ConfigError where `device` (`cpu` or `cuda`) is not here, and for a number out of range.
    """

    timeout: float = 60.0
    connect_timeout: float = CONNECT_S  # how long nobody may answer at the address of a peer; at most the timeout
    link: str | None = None
    device: str = "cpu"
    cache: Path = field(default_factory=default_cache)
    expect: str | None = None
    expect_tokenizer: str | None = None
    tokenizer: Path | None = None
    keep_queries: int = 64  # prepared, of one client, at a server
    keep_bytes: int = 4 * 2**30  # of them
    sessions: int = 64  # at a time, at a server; at a dealer, of all its servers
    client_sessions: int | None = None  # of them, of one client's certificate; None: half
    server_sessions: int | None = None  # of them, of one server's, at a dealer; None: three quarters
    idle: float = IDLE_S  # how long a session may lie unused
    session_tokens: int = 0  # of prompt and reply, in one session
    session_bytes: int = 0  # between server and client in one session, set-up aside
    budget: int = 0  # outputs that a client is given in each window
    budget_hours: float = 24.0  # of such a window
    setups: int = 16  # of the model, that a client's certificate is sent in each window
    setup_hours: float = 24.0  # of such a window
    memory: int = 8 * 2**30  # bytes that one session may hold at a time at a dealer, the masks of its model's weights included
    drain: float = 0.0  # how long sessions may go on once the service is to end
    chunk: int = 0
    pad_prompt: int = 0
    pad_reply: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", Path(self.cache))
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", Path(self.tokenizer))
        if self.expect_tokenizer is not None:
            if not re.fullmatch("[0-9a-fA-F]{64}", self.expect_tokenizer):
                raise ConfigError(
                    "the expected tokenizer is no SHA-256", remedy="give 64 hexadecimal digits, as `sha256sum` and `privinf serve` do"
                )
            object.__setattr__(self, "expect_tokenizer", self.expect_tokenizer.lower())
        check_device(self.device)
        for name in _WHOLE:
            value = getattr(self, name)
            if value is None and name in ("client_sessions", "server_sessions"):
                continue
            least = int(name in ("memory", "sessions"))
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is not a whole number from {least} on", remedy="give one, or leave it out")
        for name in ("timeout", "connect_timeout", "idle", "budget_hours", "setup_hours", "drain"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "drain"):
                raise ConfigError(f"{name} is no length of time", remedy="give a number above 0, or leave it out")

    def sessions_each(self, role: str) -> int:
        """Sessions of one certificate of this role at a time; 0: no limit of its own."""
        if role == "client":
            return max(1, self.sessions // 2) if self.client_sessions is None else self.client_sessions
        return self.sessions - self.sessions // 4 if self.server_sessions is None else self.server_sessions

    @property
    def connect_s(self) -> float:
        """How long a peer is dialled."""
        return min(self.connect_timeout, self.timeout)

    @property
    def emulated(self) -> Link | None:
        """The parsed link, ConfigError if it is malformed."""
        return parse_link(self.link) if self.link else None
