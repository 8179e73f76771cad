"""The server's tokenizer at the client: what it could tell of a prompt, how it is pinned or replaced, and that its faults are one line."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import privinf
from privinf.client.tokenizer import MAX_BYTES, Tokenizer, _ours
from protocols.errors import ConfigError, HandshakeError
from tests.support import trio as t
from tests.support.gateway import gateway
from tests.support.trio import Trio, trio

SECRET = "zq"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def edited(**parts: Any) -> bytes:
    """The tiny model's tokenizer with other parts."""
    return json.dumps({**json.loads(t.tokenizer().to_str()), **parts}).encode()


def telling() -> bytes:
    """One that makes a prompt longer if it holds the secret word."""
    return edited(normalizer={"type": "Replace", "pattern": {"String": SECRET}, "content": SECRET * 4})


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer, as one may have it from elsewhere."""
    place = tmp_path_factory.mktemp("own") / "tokenizer.json"
    place.write_bytes(t.lowered().tokenizer or b"")
    return place


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """A server whose tokenizer tells on its users."""
    with trio(t.changed(t.lowered(), tokenizer=telling()), cache=tmp_path_factory.mktemp("cache")) as made:
        yield made


def shown(parties: Trio, prompt: str, **options: Any) -> tuple[int, str]:
    """How many prompt tokens the server saw, and the digest of the tokenizer that was used."""
    client = parties.client(**options)
    list(client.generate(prompt, max_new_tokens=1))
    assert client.result is not None
    return client.result["padded"]["prompt_tokens"], client.result["model"]["tokenizer"]


def test_a_tokenizer_of_the_clients_own_does_not_tell(parties: Trio, own: Path) -> None:
    """The same two prompts, of the same length; then with a multiple in place of the length, which hides less than it seems."""
    plain, secret = "what is ab", f"what is {SECRET}"
    assert shown(parties, plain) == (10, sha(telling())) and shown(parties, secret) == (16, sha(telling()))
    assert [shown(parties, secret, pad_prompt=n)[0] for n in (12, 16)] == [24, 16]
    assert shown(parties, plain, tokenizer=own) == shown(parties, secret, tokenizer=own) == (10, sha(own.read_bytes()))
    assert shown(parties, secret, tokenizer=own, expect_tokenizer=sha(own.read_bytes()).upper())[0] == 10


def test_a_tokenizer_that_is_not_the_expected_one_is_refused(parties: Trio, own: Path) -> None:
    assert shown(parties, "x", expect_tokenizer=sha(telling()))[0] == 1
    before = dict(parties.server.counters.counts)
    with pytest.raises(HandshakeError) as caught:
        shown(parties, SECRET, expect_tokenizer=sha(own.read_bytes()))
    line = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in line and SECRET not in line
    assert f"has the tokenizer {sha(telling())}, not the expected {sha(own.read_bytes())}" in line and parties.server.address in line
    assert parties.server.counters.counts == before
    with trio(t.lowered(texts=False), cache=parties.cache) as bare, pytest.raises(HandshakeError, match="has the tokenizer none, not"):
        bare.client(expect_tokenizer=sha(own.read_bytes())).connect()


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (lambda: edited(added_tokens=[added("<more>", 97)]), {}, "has ids up to 97, and the model's vocabulary ends at 96"),
        (lambda: b"{}", {}, "the model's tokenizer cannot be read"),
        (lambda: b"x" * (MAX_BYTES + 1), {}, f"has {MAX_BYTES + 1} bytes, of at most {MAX_BYTES}"),
        (lambda: None, {}, "cannot read .*: No such file"),
        (lambda: edited(), {"expect_tokenizer": "0" * 64}, f"is the tokenizer .*, not the expected {'0' * 64}"),
        (lambda: edited(), {"expect_tokenizer": "f00d"}, "is no SHA-256"),
    ],
    ids=["too many ids", "none", "too large", "no file", "another", "no digest"],
)
def test_a_tokenizer_that_cannot_be_the_models(
    parties: Trio, tmp_path: Path, content: Callable[[], bytes | None], options: dict[str, Any], says: str
) -> None:
    data = content()
    if data is not None:
        (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ConfigError, match=says) as caught:
        parties.client(tokenizer=tmp_path / "tokenizer.json", **options).connect()
    assert "\n" not in str(caught.value)


def added(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


# ---- a tokenizer that is made to fail

PROMPT = "secret " + "a" * 20 + "!"
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [], "special_tokens": {}}
HOSTILE: dict[str, Callable[[], bytes]] = {
    "panics when it is read": lambda: edited(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "panics at a prompt": lambda: edited(normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8AAAAA"}),
    "panics at every prompt": lambda: edited(post_processor=TEMPLATE),
    "a truncation that cannot be": lambda: edited(
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    ),
    "an expression without end": lambda: edited(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a|a|aa)+$"}}),
    "an expression that is none": lambda: edited(pre_tokenizer={**SPLIT, "pattern": {"Regex": "((("}}),
    "no unknown token": lambda: edited(model={"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}),
    "panics at a reply": lambda: edited(decoder={"type": "Strip", "content": reply(), "start": 100, "stop": 100}),
}


def reply() -> str:
    """The character that the model will write."""
    logits = t.float_logits(t.tokenizer().encode(PROMPT).ids)
    first, second = logits.topk(2).values.tolist()
    assert first - second > t.CLEAR
    return t.tokenizer().decode([int(logits.argmax())])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_one_error_of_ours(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], own: Path) -> None:
    """And nothing on stderr, where the library would report a panic, which may quote the prompt."""
    with trio(t.changed(t.lowered(), tokenizer=HOSTILE[name]()), cache=tmp_path) as parties:
        with pytest.raises(ConfigError) as caught:
            list(parties.client().generate(PROMPT, max_new_tokens=2, ignore_eos=True))
        line = str(caught.value)
        assert "\n" not in line and "--tokenizer FILE" in line and PROMPT not in line
        err = capfd.readouterr().err
        assert "panicked" not in err and "backtrace" not in err and PROMPT not in err
        with parties.client(tokenizer=own) as client:
            tokens = list(client.generate("x", max_new_tokens=2, ignore_eos=True))
        assert t.is_greedy(t.tokenizer().encode("x").ids, [token.id for token in tokens])


def test_a_gateway_outlives_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hostile = t.changed(t.lowered(), tokenizer=HOSTILE["panics at a reply"]())
    with trio(hostile, cache=tmp_path) as parties, gateway(parties) as door, door.http() as caller:
        for _ in range(2):
            answer = caller.post("/v1/completions", json={"model": "privinf", "prompt": PROMPT, "max_tokens": 2})
            assert 400 <= answer.status_code < 600 and "tokenizer" in answer.text
        assert caller.get("/healthz").json()["status"] == "ok" and t.wait_for(lambda: door.engine.active == 0)
    assert "panicked" not in capfd.readouterr().err


def test_what_others_say_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """Of a call that fails nothing is shown; lines of other threads within one that does not come after it."""

    def speak(word: bytes) -> None:
        thread = threading.Thread(target=os.write, args=(2, word))
        thread.start()
        thread.join()

    with _ours("", ""):
        speak(b"kept\n")
    with pytest.raises(ConfigError), _ours("a line", ""):
        speak(b"panicked\n")
        raise ValueError
    speak(b"after\n")
    assert capfd.readouterr().err == "kept\nafter\n"


def test_it_is_the_librarys(own: Path) -> None:
    made, library = Tokenizer(own.read_bytes()), t.tokenizer()
    assert made.size == t.VOCAB and made.id_to_token(t.END) == "<|end|>" and made.id_to_token(10**6) is None
    ids = made.encode("def main(")
    assert ids == library.encode("def main(").ids and made.decode(ids, skip_special_tokens=True) == "def main("


# ---- the command line


def test_digests_are_shown_and_pinned_at_the_command_line(tmp_path: Path, own: Path) -> None:
    digest = sha(own.read_bytes())
    with t.services() as services:
        assert services.server.lines[0].endswith(f", tokenizer: sha256 {digest}")
        pinned = ("--cache", tmp_path, "--prompt", "x", "--max-new-tokens", 1, "--json")
        with services.generate(*pinned, "--expect-tokenizer", digest, "--tokenizer", own) as client:
            assert client.wait() == 0, client.err
            assert json.loads(client.out)["model"]["tokenizer"] == digest
        with services.generate(*pinned, "--expect-tokenizer", "0" * 64) as client:
            assert (
                client.wait() == 3 and client.out == "" and len(client.said) == 1 and f"has the tokenizer {digest}, not the" in client.err
            )
        remote = ("--server", services.server_address, "--dealer", services.dealer_address, "--keys", t.keys(), "--cache", tmp_path)
        with t.Process("gateway", *remote, "--http", "127.0.0.1:0", "--expect-tokenizer", "0" * 64) as process:
            assert process.wait() == 3 and len(process.said) == 1 and "not the expected" in process.err
        with t.Process("gateway", *remote, "--http", "127.0.0.1:0", "--tokenizer", own, "--json") as process:
            process.until("page: ")
            assert process.document()["tokenizer"] == digest and f"tokenizer: sha256 {digest}" in process.lines
        with t.Process("convert", t.checkpoint(), "-o", tmp_path / "model") as process:
            assert process.wait() == 0 and process.lines[-1] == f"tokenizer: sha256 {digest}"
    with privinf.local_session(t.lowered(), cache=tmp_path, tokenizer=own, expect_tokenizer=digest) as session:
        assert len(list(session.generate("x", max_new_tokens=1))) == 1
