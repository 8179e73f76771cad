"""`privinf gateway`: the client's side as a local OpenAI-compatible service."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.cli import common
from privinf.cli.signals import Stopped, allow
from protocols.errors import ConfigError

HTTP = "127.0.0.1:8080"
MAX_TEMPLATE_BYTES = 1 << 18


def gateway(
    server: Annotated[str | None, typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")] = None,
    dealer: Annotated[str | None, typer.Option("--dealer", metavar="HOST:PORT", help="Where the dealer listens.")] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", metavar="DIR", help="What `privinf keys init` made, or the client's bundle.")
    ] = None,
    demo: Annotated[Path | None, typer.Option("--demo", metavar="MODEL", help="Start dealer and server here too, with this model.")] = None,
    http: Annotated[str, typer.Option("--http", metavar="HOST:PORT", help="Where to answer; port 0 takes any free one.")] = HTTP,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="NAME", help="A name by which callers reach it; may be given several times.")
    ] = None,
    metrics: common.Metrics = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help=f"What callers must show; default: ${common.KEY_VARIABLE}, or a new one."),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The model's name for callers, beside its id.")] = "privinf",
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="A Jinja template for chats; an empty file: the plain form.")
    ] = None,
    expect: Annotated[str | None, typer.Option("--expect", metavar="ID", help="Refuse any model but the one with this id.")] = None,
    expect_tokenizer: common.ExpectTokenizer = None,
    tokenizer: common.TokenizerFile = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="The longest reply that callers get.")] = 256,
    active: Annotated[int, typer.Option("--active", metavar="N", min=1, max=64, help="Replies at a time.")] = 4,
    waiting: Annotated[int, typer.Option("--waiting", metavar="N", min=0, help="Callers that may wait; the next gets a 429.")] = 16,
    kept: Annotated[int, typer.Option("--kept", metavar="N", min=0, max=64, help="Idle conversations kept for a next turn.")] = 4,
    keep: Annotated[float, typer.Option("--keep", metavar="S", min=0.0, help="How long an idle conversation is kept, seconds.")] = 300.0,
    prepared: Annotated[
        bool, typer.Option("--prepared/--no-prepared", help="Use queries of `privinf prepare` for first turns that fit.")
    ] = True,
    retry: common.Retry = 0,
    connections: Annotated[int, typer.Option("--connections", metavar="N", min=1, help="HTTP connections at a time.")] = 256,
    http_timeout: Annotated[float, typer.Option("--http-timeout", metavar="S", help="The longest wait for a caller, seconds.")] = 30.0,
    drain: Annotated[float, typer.Option("--drain", metavar="S", min=0.0, help="How long replies may still take after a signal.")] = 5.0,
    chunk: common.Chunk = 0,
    pad_prompt: common.PadPrompt = 0,
    pad_reply: common.PadReply = 0,
    link: common.LinkName = None,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    connect_timeout: common.ConnectTimeout = common.CONNECT_S,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Answer OpenAI-compatible requests on this machine, and ask the server privately.

    The page at / shows a reply as it comes and what each party sees of it.
    It serves until Ctrl-C or SIGTERM; then replies may still end, and a second
    signal cuts them off.

    Example: privinf gateway --server s.example.org:7000 --dealer d.example.org:7001 --keys keys/client

    To try it: privinf gateway --demo models/pylib
    """
    remote = [option for option, value in (("--server", server), ("--dealer", dealer), ("--keys", keys)) if value is None]
    if (demo is None and remote) or (demo is not None and len(remote) < 3):
        raise ConfigError(
            "--demo starts the other parties itself" if demo else f"{', '.join(remote)} not given",
            remedy="give --server, --dealer and --keys, or --demo MODEL alone",
        )
    if not (math.isfinite(http_timeout) and http_timeout > 0):
        raise ConfigError(f"--http-timeout {http_timeout:g} is no time to wait", remedy="give seconds above 0")
    if not math.isfinite(drain):
        raise ConfigError("--drain has no end", remedy="give seconds")
    names = _names(http, host)
    key, made = _key(api_key)
    template = None if chat_template is None else _template(chat_template)
    lengths = {"chunk": chunk, "pad_prompt": pad_prompt, "pad_reply": pad_reply}
    pins: dict[str, Any] = {"expect": expect, "expect_tokenizer": expect_tokenizer, "tokenizer": tokenizer}
    options = common.make_options(
        timeout=timeout, connect_timeout=connect_timeout, link=link, device=device, cache=cache, **pins, **lengths
    )
    from privinf.client.client import Client
    from privinf.gateway.demo import Demo
    from privinf.gateway.door import Bounds
    from privinf.gateway.engine import Engine, Limits
    from privinf.gateway.serve import listen_on, serve
    from privinf.session.memory import few_arenas
    from privinf.session.outlet import unblocked
    from privinf.transport.keys import load_credentials

    few_arenas()
    # a signal is how a service ends: exit code 0, once everything has been ended
    with unblocked(), _until_stopped(), contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listen_on(http))]
        if metrics is not None:
            listeners.append(stack.enter_context(listen_on(metrics, "--metrics")))
        watch = None
        if demo is not None:
            watch = stack.enter_context(Demo(demo, options))
            server, dealer, keys = watch.addresses["server"], watch.addresses["dealer"], watch.keys
        client_keys = str(keys)
        client = Client(str(server), dealer=str(dealer), keys=client_keys, options=options)
        engine = Engine(client, Limits(active, waiting, kept, keep, max_new_tokens, prepared, retry), template)
        stack.callback(engine.close)
        engine.start()

        def listening(address: str, scraped: str | None = None) -> None:
            info = engine.lowered.info
            print(f"gateway listens on {address} with {info.variant}, id {engine.lowered.id}", file=sys.stderr)
            print(common.tokenizer_line(engine.lowered.tokenizer_id), file=sys.stderr)
            shown = f"#key={key}" if made else ""
            if scraped is not None:
                _say(f"gateway answers Prometheus on http://{scraped}/metrics")
            if made:
                print(f"API key, shown once: {key}", file=sys.stderr)
            print(f"page: http://{address}/{shown}", file=sys.stderr, flush=True)
            if as_json:
                about: dict[str, Any] = {"role": "gateway", "address": address, "variant": info.variant, "model": engine.lowered.id}
                about["tokenizer"] = engine.lowered.tokenizer_id
                about |= {"metrics": scraped} if scraped is not None else {}
                common.write_json({**about, "api_key": key} if made else about)

        def reload(number: int, frame: object) -> None:
            try:  # what dials reads them from the disk anyway; so their faults are told now
                client.credentials = load_credentials(client_keys, "client")
                _say("gateway has read its keys anew")
            except ConfigError as error:
                logging.getLogger("privinf.gateway").error("the keys cannot be used: %s", error)

        signal.signal(signal.SIGHUP, reload)
        bounds = Bounds(wait_s=http_timeout, idle_s=min(http_timeout, Bounds.idle_s), connections=connections, drain_s=drain)
        allow(drain)
        what: dict[str, Any] = {"api_key": key, "name": name, "names": names, "watch": watch, "bounds": bounds}
        serve(engine, listeners, listening=listening, say=_say, **what)


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
