"""Failures as data: each code from a raise at a service, through a socket, to exit code and HTTP status; and what hostile peers say."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privinf.gateway.wire import RETRY_S, VERDICTS, as_api_error
from privinf.session.options import Options
from privinf.session.service import Service
from privinf.transport import Connection, FrameKind, dial, load_credentials
from privinf.transport.failure import Failure
from privinf.transport.frames import ERROR_LIMIT, pack_header
from protocols import errors
from protocols.errors import KINDS, Code, Heard, PrivinfError, kind_of
from tests.support.tls_pair import connected, inject, keys_dir, outcome, pool

__all__ = ["keys_dir", "pool"]
ROOT = Path(__file__).resolve().parents[2]
C = Code
# how each ends, by exit code and HTTP status: where it is found, at a peer before there is a session, and at one within
BUSY, BAD = ((3, 429), (3, 429), (3, 429)), ((2, 400), None, None)
REFUSED, GONE = ((3, 502), (3, 502), (3, 502)), ((3, 503), (3, 503), (4, 502))
BROKEN, SHAKEN = ((4, 502), (3, 502), (4, 502)), ((3, 502), (3, 502), (4, 502))
ENDS: dict[Code, tuple[Any, Any, Any]] = {
    **dict.fromkeys((C.FULL, C.CLIENT_FULL, C.SERVER_FULL, C.BUDGET, C.SET_UPS), BUSY),
    **dict.fromkeys((C.CONFIG, C.TOO_LONG), BAD),
    **dict.fromkeys((C.REFUSED, C.CROWDED, C.REVOKED, C.REQUESTS, C.TOKENS, C.BYTES, C.DISK), REFUSED),
    **dict.fromkeys((C.ABSENT, C.STOPPING), GONE),
    **dict.fromkeys((C.OTHER, C.TRANSPORT, C.INTERNAL, C.IDLE, C.DESYNC, C.CORRELATION), BROKEN),
    **dict.fromkeys((C.HANDSHAKE, C.NOT_LISTED, C.SILENT, C.OPENING), SHAKEN),
    C.NO_LOGITS: ((3, 400), (3, 400), (4, 502)),
    C.RANGE: ((2, 502), None, None),
    C.UNSUPPORTED: ((5, 502), (3, 502), (4, 502)),
    C.DEFECT: ((1, 502), (3, 502), (4, 502)),
    C.TEMPLATE: ((4, 500), (3, 502), (4, 502)),
    C.GATEWAY_STOPPING: ((4, 503), (3, 502), (4, 502)),
}


class Refuser(Service):
    """Tells whoever comes of an error, or of what a third party says."""

    role = "server"
    established = False
    error: PrivinfError | None = None
    third = ""

    def handle(self, connection: Connection) -> None:
        connection.receive()
        if self.established:
            connection.establish()
        if self.third:
            with dial(self.third, self.credentials, "dealer", 20.0) as link:
                link.send(b"?")
                link.receive()
        assert self.error is not None
        raise self.error


class Dealer(Refuser):
    role = "dealer"


@pytest.fixture(scope="module")
def server(keys_dir: Path) -> Iterator[Refuser]:
    with Refuser(listen="127.0.0.1:0", keys=str(keys_dir), allowed_roles={"client"}, options=Options()) as service:
        yield service


@pytest.fixture(scope="module")
def dealer(keys_dir: Path) -> Iterator[Dealer]:
    with Dealer(listen="127.0.0.1:0", keys=str(keys_dir), allowed_roles={"server"}, options=Options()) as service:
        yield service


def told(keys_dir: Path, service: Refuser, *, established: bool) -> PrivinfError:
    """What a client of the service ends with."""
    service.established = established
    with dial(service.address, load_credentials(keys_dir, "client"), "server", 20.0) as connection:
        connection.send(b"?")
        if established:
            connection.establish()
        return outcome(connection.receive)


def end_of(error: PrivinfError) -> tuple[int, int]:
    return error.exit_code, as_api_error(error).status


def test_every_code_has_a_class_an_answer_and_an_end() -> None:
    assert set(KINDS) == set(VERDICTS) == set(ENDS) == set(Code)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, PrivinfError):
            assert KINDS[kind.code] is kind, kind


@pytest.mark.parametrize("code", list(Code))
def test_a_failure_where_it_is_found(code: Code) -> None:
    """As it is raised, and as a local session's parent has it from a child's event."""
    error = KINDS[code]("no room", party="server", peer="client c", layer="h.1", remedy="wait", code=code, retry_after=7)
    copy = Failure.from_plain(json.loads(json.dumps(Failure.of(error).plain()))).error()
    for each in (error, copy):
        assert type(each) is KINDS[code] and str(each) == "no room (layer h.1, at server, peer client c); wait"
        assert (each.code, each.again(3), end_of(each)) == (code, 7, ENDS[code][0])


@pytest.mark.parametrize("established", [False, True])
@pytest.mark.parametrize("code", list(Code))
def test_a_failure_from_a_service_to_its_peer(keys_dir: Path, server: Refuser, code: Code, established: bool) -> None:
    server.error, server.third = KINDS[code]("no room for you", code=code, retry_after=7), ""
    error = told(keys_dir, server, established=established)
    if KINDS[code] in (errors.ConfigError, errors.RangeError):  # nobody's business but ours
        assert "the peer ended the session" in str(error) and error.code in (Code.OPENING, Code.TRANSPORT)
        return
    verb = "gave up" if established and KINDS[code] is not errors.RefusedError else "refused"
    assert error.message == f"the peer {verb}: no room for you" and error.reason == "no room for you"
    assert (error.code, error.again(3), error.heard) == (code, 7, Heard.SESSION if established else Heard.OPENING)
    assert error.fault == error.peer == f"server {server.address}" and error.party == "client"
    assert type(error) is kind_of(code, error.heard) and end_of(error) == ENDS[code][1 + established]
    copy = Failure.from_plain(json.loads(json.dumps(Failure.of(error).plain()))).error()
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    answer = as_api_error(error)
    assert answer.retry_after == (0 if answer.status not in (429, 503) else 7)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (C.FULL, errors.RefusedError),
        (C.DESYNC, errors.ProtocolDesync),
        (C.CORRELATION, errors.TransportError),
        (C.STOPPING, errors.TransportError),
    ],
)
def test_a_reason_that_is_relayed_is_told_once_and_says_whose(
    keys_dir: Path, server: Refuser, dealer: Dealer, code: Code, kind: type[PrivinfError]
) -> None:
    dealer.error, dealer.established = KINDS[code]("no room for you", code=code, retry_after=9), False
    server.third = dealer.address
    error = told(keys_dir, server, established=True)
    verb = "refused" if kind is errors.RefusedError else "gave up"
    assert type(error) is kind and error.message == f"the peer {verb}: no room for you"
    assert (error.code, error.again(3)) == (code, 9)
    assert error.fault == f"dealer {dealer.address}" and error.peer == f"server {server.address}"
    assert str(error).endswith(f"(at client, peer dealer {dealer.address} by way of server {server.address})")


def test_a_fault_of_ours_is_told_as_that_and_no_more(keys_dir: Path, server: Refuser) -> None:
    server.error, server.third = None, ""
    error = told(keys_dir, server, established=True)
    assert error.code is Code.INTERNAL and error.reason == "internal error at the server"


def test_a_refusal_for_now() -> None:
    at_once, later = (errors.RefusedError.for_now("full", Code.FULL, after=after) for after in (0, 8))
    assert (at_once.message, at_once.again(5)) == ("full; come again later", 5)
    assert (later.message, later.again(5)) == ("full; come again later, in 8 s", 8)
    assert errors.RefusedError("never").again(5) is None
    assert as_api_error(at_once).retry_after == RETRY_S


# ---- peers that lie


def packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode({"code": "full", "text": "no room", **fields})


UNREADABLE = [
    b"",
    b"no room",
    b"\xff" * 100,
    b"\x91" * ERROR_LIMIT,
    b"\xdf\xff\xff\xff\xff",
    packed()[:-1],
    packed() + b"\0",
    packed(text=7),
    packed(code=["full"]),
    packed(code=None),
    packed(retry=-1),
    packed(retry=1 << 40),
    packed(retry="soon"),
    packed(retry=1.5),
    packed(surplus=1),
    packed(heard="never"),
    msgspec.msgpack.encode({"code": "full"}),
    packed(text="x").replace(b"\xa1x", b"\xa1\xff"),
]


@pytest.mark.parametrize("established", [False, True])
def test_errors_that_cannot_be_read(keys_dir: Path, pool: ThreadPoolExecutor, established: bool) -> None:
    for body in UNREADABLE:
        with connected(keys_dir, pool, established=established) as pair:
            inject(pair.server, pack_header(len(body), FrameKind.ERROR, 0, 0, 0) + body)
            error = outcome(pair.client.receive)
            assert type(error) is (errors.TransportError if established else errors.HandshakeError)
            assert error.code is Code.OTHER and error.reason == "no reason given" and error.again(3) is None


@pytest.mark.parametrize("established", [False, True])
def test_errors_that_say_more_than_they_may(keys_dir: Path, pool: ThreadPoolExecutor, established: bool) -> None:
    bodies = [
        packed(text="no\x1b[31m room\nfor\u202e you " + "x" * 2000, about="dealer\x1b[2J\n" + "y" * 1000, retry=0),
        packed(
            code="no such code", text="no [31m room for you", remedy="run rm -r /", layer="h.1", who="dealer", fault="client", reason="you"
        ),
        packed(code="configuration", text="no [31m room for you", heard=""),
        packed(code="defect", text="no [31m room for you"),
    ]
    for number, body in enumerate(bodies):
        with connected(keys_dir, pool, established=established) as pair:
            inject(pair.server, pack_header(len(body), FrameKind.ERROR, 0, 0, 0) + body)
            error = outcome(pair.client.receive)
            assert "no [31m room for you" in error.reason and len(error.message) < 530 and len(error.fault) < 201
            assert error.fault.isprintable() and not error.remedy and not error.layer and error.party == "client"
            assert error.peer == f"server {pair.client.peer_name}" and error.heard is (Heard.SESSION if established else Heard.OPENING)
            expected = errors.RefusedError if number == 0 else errors.TransportError if established else errors.HandshakeError
            assert type(error) is expected and (error.code is Code.OTHER) == (number == 1)
            assert end_of(error) == ((3, 429) if number == 0 else (4 if established else 3, 502))


def test_an_error_that_is_too_long_is_refused_before_its_body(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    with connected(keys_dir, pool) as pair:
        inject(pair.server, pack_header(ERROR_LIMIT + 1, FrameKind.ERROR, 0, 0, 0))
        assert f"a ERROR frame that claims {ERROR_LIMIT + 1} bytes" in str(outcome(pair.client.receive))


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300)
    | st.dictionaries(st.sampled_from(Failure.__struct_fields__), st.integers(-9, 9) | st.text()).map(msgspec.msgpack.encode)
)
def test_any_bytes_are_a_failure_within_bounds(body: bytes) -> None:
    said = Failure.from_peer(body)
    assert 0 < len(said.text) <= 500 and said.text.isprintable() and said.about.isprintable() and isinstance(said.code, Code)


@settings(deadline=None)
@given(
    st.builds(Failure, st.sampled_from(Code), st.text(), about=st.text(), retry=st.none() | st.integers(0, 1 << 31)), st.integers(0, 3000)
)
def test_what_we_say_is_short_enough_and_can_be_read(failure: Failure, more: int) -> None:
    long = msgspec.structs.replace(failure, text=failure.text + "\U0001f600" * more, about=failure.about + "\U0001f600" * more)
    body = long.for_peer()
    said = Failure.from_peer(body)
    assert len(body) < ERROR_LIMIT and (said.code, said.retry) == (failure.code, failure.retry)


def test_a_time_beyond_bounds_is_told_as_the_bound() -> None:
    said = Failure.from_peer(Failure.of(errors.RefusedError("budget", retry_after=1 << 50)).for_peer())
    assert said.text == "budget" and said.retry == 1 << 31


# ---- nobody reads the words


ERRORS = {"error", "refusal", "refused", "failure", "fault"}
READERS = {"search", "match", "fullmatch", "findall", "finditer", "startswith", "endswith", "removeprefix", "find", "index", "count"}


def words_of(node: ast.AST) -> bool:
    """Whether an expression has an error's words in it."""

    def named(part: ast.AST) -> bool:
        return ast.unparse(part).rpartition(".")[2] in ERRORS

    return any(
        (isinstance(part, ast.Attribute) and part.attr in ("message", "reason", "text") and named(part.value))
        or (isinstance(part, ast.Call) and ast.unparse(part.func) in ("str", "repr") and any(map(named, part.args)))
        for part in ast.walk(node)
    )


def readers_in(source: str) -> list[str]:
    """Where an error's words decide something."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            found += [node for side in node.comparators if words_of(side)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
            found += [node for part in (node.func.value, *node.args) if words_of(part)]
    return [ast.unparse(node) for node in found]


def test_no_program_reads_the_words_of_an_error() -> None:
    for bad in ('"full" in error.message', "re.search(AGAIN, str(error))", "_AGAIN.match(error.message)", 'error.message.startswith("x")'):
        assert readers_in(bad), bad
    files = [path for room in ("privinf", "protocols") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    assert not {str(path): found for path in files if (found := readers_in(path.read_text("utf-8")))}


def test_an_error_is_raised_with_a_code_of_its_class() -> None:
    """Where the code is given by its name: all of them are raised somewhere."""
    seen = set()
    for path in (path for room in ("privinf", "protocols") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            codes = [word.value for word in node.keywords if word.arg == "code"] + node.args
            for given_ in codes:
                if isinstance(given_, ast.Attribute) and isinstance(given_.value, ast.Name) and given_.value.id == "Code":
                    kind = node.func.value if isinstance(node.func, ast.Attribute) else node.func
                    seen.add(Code[given_.attr])
                    if isinstance(kind, ast.Name) and hasattr(errors, kind.id) and kind.id != "Code":
                        assert KINDS[Code[given_.attr]] is getattr(errors, kind.id), f"{path}: {ast.unparse(node)}"
    own = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PrivinfError)}
    assert not set(Code) - seen - own - {C.CLIENT_FULL, C.SERVER_FULL, C.TEMPLATE, C.GATEWAY_STOPPING}


def test_peers_that_cannot_be_reached_are_that_only_before_a_session() -> None:
    assert (
        kind_of(Code.ABSENT, Heard.OPENING) is errors.PeerUnreachableError and kind_of(Code.ABSENT, Heard.SESSION) is errors.TransportError
    )
