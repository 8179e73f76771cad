"""What a person may set for a session: small dataclasses for what they configure, and one frozen object of them all."""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from privinf.session.devices import check_device
from privinf.setting import Setting, settings_of
from privinf.trust import DEALER, EMBEDDINGS, ENCRYPTED, ONE_HOT, TRUSTS, TWO_PARTY
from protocols.errors import ConfigError

if TYPE_CHECKING:  # imported where a link is parsed: `privinf --help` reads these fields, and has no use for TLS
    from privinf.transport.shaper import Link

MAX_NEW_TOKENS = 32
LONGEST = 1 << 20  # new tokens of one reply, beyond any model's context
IDLE_S = 3600.0  # how long a session may lie unused
EMBEDDING_TEXT = "Rows of the server's table: by one-hots, or by a table that clients keep encrypted."
CONNECT_S = 10.0  # how long a party may be away before who dials it gives up


def default_cache() -> Path:
    """The user's cache directory for this program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "privinf"


@dataclass(frozen=True)
class Runtime:
    """Where a party computes and what it keeps, and how long it waits, in seconds. `link` is an emulated one between server and client."""

    link: Annotated[str | None, Setting("Emulate a link: lan, wan or RTTms:MBITS, for example 20ms:100.", "LINK")] = None
    device: Annotated[str, Setting("Where this party computes.", choices=("cpu", "cuda"))] = "cpu"
    timeout: Annotated[float, Setting("The longest wait for a peer, in seconds.", "S")] = 60.0
    connect_timeout: Annotated[float, Setting("How long to try to reach a peer; at most --timeout.", "S")] = CONNECT_S
    cache: Annotated[Path, Setting("What is kept between runs; default: the user's cache directory.", "DIR")] = field(
        default_factory=default_cache
    )

    @property
    def connect_s(self) -> float:
        """How long a peer is dialled."""
        return min(self.connect_timeout, self.timeout)

    @property
    def emulated(self) -> Link | None:
        """The parsed link, ConfigError if it is malformed."""
        from privinf.transport.shaper import parse_link

        return parse_link(self.link) if self.link else None


@dataclass(frozen=True)
class Trust:
    """Who makes the correlations, and how a server embeds; None: a dealer, by one-hots, and for a client whatever the server says."""

    trust: Annotated[str | None, Setting("Refuse a server with another trust model; default: what it has.", choices=TRUSTS)] = None
    embedding: Annotated[str | None, Setting(EMBEDDING_TEXT, choices=EMBEDDINGS)] = None


@dataclass(frozen=True)
class Pins:
    """What a client insists on: the model's id, the tokenizer's SHA-256; and a tokenizer in place of the bundle's."""

    expect: Annotated[str | None, Setting("Refuse any model but the one with this id.", "ID")] = None
    expect_tokenizer: Annotated[str | None, Setting("Refuse any tokenizer but the one with this digest.", "SHA256")] = None
    tokenizer: Annotated[Path | None, Setting("A tokenizer.json to use in place of the server's.", "FILE")] = None


@dataclass(frozen=True)
class Lengths:
    """Passes of at most `chunk` positions take in the prompt; the server sees both lengths as multiples of the others. 0: neither."""

    chunk: Annotated[int, Setting("Take in the prompt N tokens at a time, for less memory; 0: all at once.", "N", least=0)] = 0
    pad_prompt: Annotated[int, Setting("Pad the prompt in front to a multiple of N tokens, to hide its length.", "N", least=0)] = 0
    pad_reply: Annotated[int, Setting("Pad the reply to a multiple of N tokens, to hide its length.", "N", least=0)] = 0


@dataclass(frozen=True)
class PoolLimits:
    """Prepared queries that a server keeps for one client, and their bytes."""

    keep_queries: Annotated[int, Setting("Prepared queries kept for one client.", "N", least=0)] = 64
    keep_bytes: Annotated[int, Setting("Bytes of them.", "B", least=0)] = 4 * 2**30


@dataclass(frozen=True)
class Admission:
    """Sessions at a time, at a dealer of all its servers; and of them, of one client's certificate."""

    sessions: Annotated[int, Setting("Sessions at a time; the next is told to come again later.", "N", least=1)] = 64
    client_sessions: Annotated[
        int | None, Setting("Of them, of one client's certificate; 0: no limit of its own; default: half.", "N", least=0)
    ] = None


@dataclass(frozen=True)
class DealerLimits:
    """Sessions of one server at a dealer, and the bytes that one may hold there at a time, the masks of its model's weights included."""

    server_sessions: Annotated[int | None, Setting("Of them, of one server's; 0: no limit; default: three quarters.", "N", least=0)] = None
    memory: Annotated[int, Setting("Bytes that a session may hold at a time, the masks of its model included.", "B", least=1)] = 8 * 2**30


@dataclass(frozen=True)
class Holding:
    """What the sessions of a server without a dealer hold at a time, all of them together; see `privinf.server.room`."""

    hold: Annotated[int, Setting("Bytes that sessions without a dealer hold at a time, all in all; 0: no limit.", "B", least=0)] = 8 * 2**30


@dataclass(frozen=True)
class Quotas:
    """What a client gets of a server: in one session (set-up's bytes aside), and in each window of hours. 0: no bound."""

    session_tokens: Annotated[int, Setting("Tokens of prompt and reply in one session; 0: the context's.", "N", least=0)] = 0
    batch: Annotated[int, Setting("Sequences that one session may hold at a time.", "N", least=1, most=1024)] = 16
    session_bytes: Annotated[int, Setting("Bytes between client and server in one session; 0: no limit.", "B", least=0)] = 0
    budget: Annotated[int, Setting("Outputs (tokens) for one client in a window of hours; 0: no limit.", "N", least=0)] = 0
    budget_hours: Annotated[float, Setting("The hours of such a window.", "H")] = 24.0
    setups: Annotated[int, Setting("Set-ups that one certificate is sent in a window of hours; 0: no limit.", "N", least=0)] = 16
    setup_hours: Annotated[float, Setting("The hours of such a window.", "H")] = 24.0


@dataclass(frozen=True)
class Ending:
    """How long a session may lie unused, and may go on once the service is to end."""

    idle: Annotated[float, Setting("How long a session may lie unused, seconds.", "S")] = IDLE_S
    drain: Annotated[float, Setting("After a signal, how long sessions may go on; a second one ends them.", "S", least=0.0)] = 0.0


@dataclass(frozen=True)
class Options(Ending, Quotas, Holding, DealerLimits, Admission, PoolLimits, Lengths, Pins, Trust, Runtime):
    """All that a session, a server or a dealer takes, in one object, for who writes Python.

    It has the parts' fields, and they are more than a dozen for that reason alone. ConfigError where `device` (`cpu` or `cuda`) is not
    here, and for a number out of range.
    """

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
        if self.trust not in (None, *TRUSTS):
            raise ConfigError(f"there is no trust model {str(self.trust)[:80]!r}", remedy=f"give {' or '.join(TRUSTS)}")
        if self.embedding not in (None, *EMBEDDINGS):
            raise ConfigError(f"there is no embedding {str(self.embedding)[:80]!r}", remedy=f"give {' or '.join(EMBEDDINGS)}")
        if self.trust == TWO_PARTY and self.embedding == ONE_HOT:
            raise ConfigError("two parties alone have an encrypted embedding", remedy="leave the embedding out")
        check_device(self.device)
        for name, (kind, setting) in _settings().items():
            _check(name, kind, setting, getattr(self, name))

    @property
    def trusted(self) -> str:
        """Who makes the correlations where nobody else decides."""
        return self.trust or DEALER

    @property
    def embedded(self) -> str:
        """How a server of this trust model embeds."""
        return self.embedding or (ONE_HOT if self.trusted == DEALER else ENCRYPTED)

    def sessions_each(self, role: str) -> int:
        """Sessions of one certificate of this role at a time; 0: no limit of its own."""
        if role == "client":
            return max(1, self.sessions // 2) if self.client_sessions is None else self.client_sessions
        return self.sessions - self.sessions // 4 if self.server_sessions is None else self.server_sessions


def with_trust(options: Options | None, trust: str | None, embedding: str | None = None) -> Options:
    """The options, or the defaults, with this trust model and embedding if one is given."""
    given = {name: value for name, value in (("trust", trust), ("embedding", embedding)) if value is not None}
    return replace(options or Options(), **given)  # type: ignore[arg-type]


@functools.cache
def _settings() -> dict[str, tuple[Any, Setting]]:
    return settings_of(Options)


def _check(name: str, kind: Any, setting: Setting, value: Any) -> None:
    """Whole numbers from their least one on, and lengths of time above 0, or from it on."""
    if kind is int or (kind == int | None and value is not None):
        least = setting.least or 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is not a whole number from {least} on", remedy="give one, or leave it out")
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and setting.least is None):
            raise ConfigError(f"{name} is no length of time", remedy="give a number above 0, or leave it out")
