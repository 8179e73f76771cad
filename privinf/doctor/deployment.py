"""A deployment that runs, looked at from outside: server, dealer and gateway each, and the first two together."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from privinf.client.setup import ClientStore, receive_bundle
from privinf.doctor.finding import Check, roles_of, tried
from privinf.session.messages import MAX_KINDS, End, Join, Key, Needs, Session, SessionSeed, Welcome, greet
from privinf.transport.connection import Connection
from privinf.transport.hint import hint_of
from privinf.transport.keys import load_credentials
from privinf.transport.listener import Waiting, dial, parse_address
from privinf.trust import DEALER, TEXTS, TWO_PARTY
from protocols.errors import ConfigError, HandshakeError, PeerUnreachableError

MAX_ANSWER = 1 << 16


class Deployment:
    """The parties that run, seen by the client, or a dealer by its server, according to whose keys these are."""

    def __init__(
        self, keys: Path | None, timeout: float, connect_s: float, expect: str | None, cache: Path, waiting: Waiting | None = None
    ) -> None:
        self._keys, self._timeout, self._connect_s, self._expect, self._waiting = keys, timeout, connect_s, expect, waiting
        self._store = ClientStore(cache)
        self._model: str | None = None  # the server's
        self._trust = DEALER

    def checks(self, server: str | None, dealer: str | None, gateway: str | None, api_key: str | None) -> Iterator[Check]:
        """Asks each party whose address is given, then tries a session with the server and the dealer if both answered."""
        found = []
        for role, address, ask in (("server", server, self._server), ("dealer", dealer, self._dealer)):
            if address is not None:
                found.append(tried(f"{role} at {address}", partial(ask, address)))
                yield found[-1]
        if server is not None and all(check.ok for check in found) and self._keys is not None and "client" in roles_of(self._keys):
            yield tried("session", lambda: self._session(server, dealer))
        if gateway is not None:
            yield tried(f"gateway at {gateway}", lambda: self._gateway(gateway, api_key))

    @contextlib.contextmanager
    def _dialled(self, role: str, address: str, *, mine: str = "client", hint: str = "") -> Iterator[Connection]:
        """A connection past TLS and the comparison of versions."""
        if self._keys is None:
            raise ConfigError(f"the {role} answers only to parties with a certificate", remedy="give --keys")
        ours, limit = load_credentials(self._keys, mine), self._connect_s
        dialled = dial(address, ours, role, self._timeout, connect_s=limit, waiting=self._waiting, hint=hint)
        with contextlib.closing(dialled) as connection:
            greet(connection)
            yield connection

    def _server(self, address: str) -> str:
        with self._dialled("server", address) as connection:
            welcome = connection.receive_control(Welcome)
            self._model = welcome.model
            self._trust = welcome.trust
            self._compare(welcome.model, "server")
            found = receive_bundle(connection, welcome, self._store, f"server {address}").tokenizer_id
        tokenizer, logits = found or "none", "grants" if welcome.logits else "does not grant"
        trust = "" if welcome.trust == DEALER else f"; {TEXTS.get(welcome.trust, welcome.trust[:40])}"
        return f"answers, serves the model {welcome.model}, tokenizer {tokenizer}, {logits} logits{trust}"

    def _dealer(self, address: str) -> str:
        roles = roles_of(self._keys) if self._keys is not None else []
        mine = next((role for role in ("client", "server") if role in roles), "client")
        with self._dialled("dealer", address, mine=mine):
            return f"answers as dealer to our {mine}"

    def _session(self, server: str, dealer: str | None) -> str:
        """All that comes before a query but the set-up, which is not fetched: so the server has asked its dealer for a session."""
        with self._dialled("server", server) as connection:
            trust = connection.receive_control(Welcome).trust
            connection.send_control(Needs(()))  # nothing of the public bundle
            if trust == TWO_PARTY:
                connection.receive_control(Key, MAX_KINDS)
            connection.send_control(Needs(()))  # nor of the weights
            token = connection.receive_control(Session).token
            if dealer is not None and trust == DEALER:
                with self._dialled("dealer", dealer, hint=hint_of(token)) as link:
                    link.send_control(Join(token))
                    link.receive_control(SessionSeed)
            connection.send_control(End())
        if self._trust == TWO_PARTY:
            return "the server opened one for us, without a dealer"
        return "server and dealer opened one for us" if dealer is not None else "the server reaches its dealer"

    def _gateway(self, address: str, api_key: str | None) -> str:
        status, about = self._get(address, "/healthz")
        model = str(about.get("model", ""))
        if status == 421:
            raise HandshakeError("does not go by that name", remedy="start it with --host and the name")
        if status != 200:
            raise HandshakeError(f"answers {status}: {str(about.get('status', 'not well'))[:100]}", remedy="look at the gateway's output")
        if self._model is not None and self._model != model:
            raise HandshakeError(f"has the model {model[:64]}, and the server {self._model}", remedy="restart the gateway")
        self._compare(model, "gateway")
        if api_key is None:
            return f"answers, has the model {model}"
        if self._get(address, "/v1/models", api_key)[0] != 200:
            raise HandshakeError("refuses the API key", remedy="give the one that it was started with")
        return f"answers, has the model {model}, takes the API key"

    def _get(self, address: str, path: str, api_key: str | None = None) -> tuple[int, dict[str, Any]]:
        host, port = parse_address(address)
        caller = http.client.HTTPConnection(host, port, timeout=self._connect_s)
        try:
            caller.request("GET", path, headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"})
            answer = caller.getresponse()
            found = json.loads(answer.read(MAX_ANSWER))
            if not isinstance(found, dict):
                raise ValueError
        except (http.client.HTTPException, ValueError):
            raise HandshakeError("answers, but is no gateway of ours", remedy="check the port") from None
        except OSError as error:
            raise PeerUnreachableError(
                f"could not connect: {error.strerror or error}", remedy="check that the gateway runs and listens there"
            ) from None
        finally:
            caller.close()
        return answer.status, found

    def _compare(self, model: str, role: str) -> None:
        if self._expect is not None and model != self._expect:
            raise HandshakeError(
                f"has the model {model[:64]}, not the expected {self._expect[:64]}", remedy=f"compare with the {role}'s output"
            )
