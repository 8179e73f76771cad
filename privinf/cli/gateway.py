"""`privinf gateway`: the client's side as a local OpenAI-compatible service."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Embedding, ExpectTrust, Metrics, make_options
from privinf.cli.services import serving
from privinf.cli.signals import Stopped, allow
from privinf.gateway.limits import Bounds, Limits
from privinf.session.options import Lengths, Options, Pins, Runtime
from privinf.setting import Setting
from privinf.trust import DEALER
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from privinf.client.client import Client
    from privinf.gateway.page import Watch
    from privinf.lowering import Lowered

MAX_TEMPLATE_BYTES = 1 << 18


@dataclass(frozen=True)
class Peers:
    """Whom it asks: a server elsewhere, and its dealer if it has one, or those of a demo."""

    server: Annotated[str | None, Setting("Where the server listens.", "HOST:PORT")] = None
    dealer: Annotated[str | None, Setting("Where the dealer listens.", "HOST:PORT")] = None
    keys: Annotated[Path | None, Setting("What `privinf keys init` made, or the client's bundle.", "DIR")] = None
    demo: Annotated[Path | None, Setting("Start dealer and server here too, with this model.", "MODEL")] = None
    trust: ExpectTrust = None
    embedding: Embedding = None

    def check(self) -> None:
        """ConfigError unless it is one of the two, and whole."""
        if self.demo is None and self.embedding is not None:
            raise ConfigError("--embedding is for the server to choose", remedy="give it to `privinf serve`, or with --demo")
        needed = {"--server": self.server, "--keys": self.keys, "--dealer": self.dealer if self.trust == DEALER else ""}
        missing = [option for option, value in needed.items() if value is None]
        if (self.demo is None and missing) or (self.demo is not None and any((self.server, self.dealer, self.keys))):
            raise ConfigError(
                "--demo starts the other parties itself" if self.demo else f"{', '.join(missing)} not given",
                remedy="give --server, --keys, and --dealer if the server has one, or --demo MODEL alone",
            )


@dataclass(frozen=True)
class Callers:
    """Where it answers, for whom, and as what."""

    http: Annotated[str, Setting("Where to answer; port 0 takes any free one.", "HOST:PORT")] = "127.0.0.1:8080"
    host: Annotated[list[str] | None, Setting("A name by which callers reach it; may be given several times.", "NAME")] = None
    cors: Annotated[list[str] | None, Setting("A site whose pages may call it, with the key; may be given several times.", "ORIGIN")] = None
    metrics: Metrics = None
    api_key: Annotated[str | None, Setting(f"What callers must show; default: ${common.KEY_VARIABLE}, or a new one.", "KEY")] = field(
        default=None, repr=False
    )
    name: Annotated[str, Setting("The model's name for callers, beside its id.", "NAME")] = "privinf"
    chat_template: Annotated[Path | None, Setting("A Jinja template for chats; an empty file: the plain form.", "FILE")] = None


@expand()
def gateway(
    peers: Peers,
    callers: Callers,
    pins: Pins,
    limits: Limits,
    bounds: Bounds,
    lengths: Lengths,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Answer OpenAI-compatible requests on this machine, and ask the server privately.

    The page at / shows a reply as it comes and what each party sees of it.
    It serves until Ctrl-C or SIGTERM; then replies may still end, and a second
    signal cuts them off.

    Example: privinf gateway --server s.example.org:7000 --dealer d.example.org:7001 --keys keys/client

    To try it: privinf gateway --demo models/pylib
    """
    peers.check()
    if not (math.isfinite(bounds.wait_s) and bounds.wait_s > 0):
        raise ConfigError(f"--http-timeout {bounds.wait_s:g} is no time to wait", remedy="give seconds above 0")
    if not math.isfinite(bounds.drain_s):
        raise ConfigError("--drain has no end", remedy="give seconds")
    bounds = replace(bounds, idle_s=min(bounds.wait_s, bounds.idle_s))
    names, origins = _names(callers.http, callers.host), _origins(callers.cors)
    key, made = _key(callers.api_key)
    template = None if callers.chat_template is None else _template(callers.chat_template)
    options = make_options(runtime, pins, lengths, trust=peers.trust, embedding=peers.embedding)
    from privinf.gateway.engine import Engine
    from privinf.gateway.serve import serve
    from privinf.transport.listener import bound

    # a signal is how a service ends: exit code 0, once everything has been ended
    with serving(), _until_stopped(), contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(bound(callers.http, "--http"))]
        if callers.metrics is not None:
            listeners.append(stack.enter_context(bound(callers.metrics, "--metrics")))
        client, watch = _client(peers, options, stack)
        engine = Engine(client, limits, template)
        stack.callback(engine.close)
        engine.start()

        def listening(address: str, scraped: str | None = None) -> None:
            _announce(engine.model.lowered, address, scraped, key if made else None, as_json=as_json)

        allow(bounds.drain_s)
        what: dict[str, Any] = {"api_key": key, "name": callers.name, "names": names, "origins": origins, "watch": watch, "bounds": bounds}
        serve(engine, listeners, listening=listening, say=_say, **what)


def _client(peers: Peers, options: Options, stack: contextlib.ExitStack) -> tuple[Client, Watch | None]:
    """The client, which on SIGHUP reads its keys anew; and what shows the parties of a demo, which end with the stack."""
    from privinf.client.client import Client
    from privinf.transport.keys import load_credentials

    watch = None
    if peers.demo is not None:
        from privinf.gateway.demo import Demo

        watch = stack.enter_context(Demo(peers.demo, options))
        peers = Peers(watch.addresses["server"], watch.addresses.get("dealer"), watch.keys)
    keys = str(peers.keys)
    client = Client(str(peers.server), dealer=peers.dealer, keys=keys, options=options)

    def reload(number: int, frame: object) -> None:
        try:  # what dials reads them from the disk anyway; so their faults are told now
            client.peers.credentials = load_credentials(keys, "client")
            _say("gateway has read its keys anew")
        except ConfigError as error:
            logging.getLogger("privinf.gateway").error("the keys cannot be used: %s", error)

    signal.signal(signal.SIGHUP, reload)
    return client, watch


def _announce(lowered: Lowered, address: str, scraped: str | None, key: str | None, *, as_json: bool) -> None:
    """Where it listens, and the key if it was made now."""
    variant = lowered.info.variant
    _say(f"gateway listens on {address} with {variant}, id {lowered.id}")
    _say(common.tokenizer_line(lowered.tokenizer_id))
    if scraped is not None:
        _say(f"gateway answers Prometheus on http://{scraped}/metrics")
    if key is not None:
        _say(f"API key, shown once: {key}")
    _say(f"page: http://{address}/{'' if key is None else f'#key={key}'}")
    if as_json:
        about = {"role": "gateway", "address": address, "variant": variant, "model": lowered.id, "tokenizer": lowered.tokenizer_id}
        about |= {} if scraped is None else {"metrics": scraped}
        common.write_json(about if key is None else {**about, "api_key": key})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(http: str, given: list[str] | None) -> list[str]:
    """By which names it may be called, that of its address included."""
    from privinf.gateway.hosts import host_of
    from privinf.transport.listener import parse_address

    for name in given or ():
        if host_of(name) != name.lower() or ":" in name:
            raise ConfigError(f"--host {name[:100]!r} is no name", remedy="give a name alone, for example gateway.example.org")
    return [parse_address(http)[0].lower(), *(name.lower() for name in given or ())]


def _origins(given: list[str] | None) -> list[str]:
    """Sites as browsers name them."""
    for origin in given or ():
        if not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?", origin):
            remedy = "give scheme, name and port as a browser does, for example https://app.example.org"
            raise ConfigError(f"--cors {origin[:100]!r} is no origin", remedy=remedy)
    return list(given or ())


@contextlib.contextmanager
def _until_stopped() -> Iterator[None]:
    try:
        yield
    except Stopped:
        _say("gateway stops")


def _key(given: str | None) -> tuple[str, bool]:
    """The API key, and whether it was made now."""
    key = given if given is not None else os.environ.get(common.KEY_VARIABLE)
    if key is None:
        return f"sk-privinf-{secrets.token_urlsafe(24)}", True
    if not (key.isascii() and key.isprintable() and len(key) >= 8 and " " not in key):
        raise ConfigError("the API key is no key", remedy="give at least 8 printable characters without blanks")
    return key, False


def _template(path: Path) -> str:
    try:
        text = path.read_bytes()[: MAX_TEMPLATE_BYTES + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if len(text) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_TEMPLATE_BYTES} characters, which is no chat template")
    return text
