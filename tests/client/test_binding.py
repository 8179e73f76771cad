"""What a client keeps of a model is what the model's id stands for, whatever another server of the same CA says or sends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.client.client import Client
from privinf.server.server import Server
from protocols.errors import HandshakeError
from tests.support import trio as t
from tests.support.trio import Trio, trio

PROMPT = [1, 2, 3]


@contextlib.contextmanager
def liar(parties: Trio, *, copied: bool) -> Iterator[Server]:
    """A second server of the same CA with other weights, which claims the first's id, with its own bundle or with a copy of the first's."""
    honest, model = parties.server, t.changed(t.lowered(nudge=0.01))
    with Server(model, listen="127.0.0.1:0", dealer=parties.dealer.address, keys=str(t.keys()), options=honest.options) as server:
        model.id = honest.lowered.id
        if copied:
            server.model.bundle = honest.model.bundle
        yield server


def of(parties: Trio, server: Server, cache: Path) -> Client:
    made = parties.client(cache=cache)
    made.peers.server = server.address
    return made


def ask(client: Client) -> tuple[list[int], int]:
    """Three tokens, and the bytes of masked weights that came for them."""
    tokens = [token.id for token in client.generate(ids=PROMPT, max_new_tokens=3, ignore_eos=True)]
    assert client.result is not None
    return tokens, client.result["traffic"]["setup"]["payload"]


def kept(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*/*") if path.is_file()}


@pytest.mark.parametrize("copied", [False, True], ids=["own bundle", "copied bundle"])
def test_a_server_that_claims_anothers_id_poisons_nothing(parties: Trio, tmp_path: Path, copied: bool) -> None:
    with liar(parties, copied=copied) as server:
        for _ in range(2):
            with pytest.raises(HandshakeError) as caught:
                ask(of(parties, server, tmp_path))
            line = str(caught.value)
            assert caught.value.exit_code == 3 and "\n" not in line and server.address in line
            assert ("is not what its model's id stands for" if copied else "is not that of the model whose id the server gave") in line
            assert not [name for name in kept(tmp_path) if name.startswith("setup/")] and len(kept(tmp_path)) == copied
        tokens, fetched = ask(of(parties, parties.server, tmp_path))
        assert t.is_greedy(PROMPT, tokens) and fetched > 50_000
        before = kept(tmp_path)
        with contextlib.suppress(HandshakeError):  # it computes with other weights than those that are kept: its reply is worth nothing
            ask(of(parties, server, tmp_path))
        assert kept(tmp_path) == before
        assert ask(of(parties, parties.server, tmp_path)) == (tokens, 0)


def test_what_was_poisoned_before_is_not_used(parties: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole masked weights of another model, in place of what was kept."""
    tokens, fetched = ask(of(parties, parties.server, tmp_path))
    with trio(t.lowered(nudge=0.01), cache=tmp_path / "other") as others:
        ask(others.client())
        items = others.server.lowered.setup.items
        for name, item in parties.server.lowered.setup.items.items():
            (ours,), (theirs,) = (
                list(tmp_path.glob(f"{place}setup/*/{each.sha256}.bin")) for place, each in (("", item), ("other/", items[name]))
            )
            ours.write_bytes(theirs.read_bytes())
    caplog.clear()
    assert ask(of(parties, parties.server, tmp_path)) == (tokens, fetched)
    assert len([record for record in caplog.records if "was damaged and is fetched anew" in record.getMessage()]) == len(items)
    assert ask(of(parties, parties.server, tmp_path)) == (tokens, 0)


def test_a_server_sends_no_masked_weight_but_that_of_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions of a weight under one mask would give both away."""
    with trio(t.changed(t.lowered()), cache=tmp_path) as parties:
        encoded: Any = parties.server.model.encoded
        name = next(iter(encoded))
        sent = parties.server.lowered.setup.items[name]
        with monkeypatch.context() as patched:
            patched.setitem(encoded, name, torch.zeros_like(encoded[name]))
            with pytest.raises(HandshakeError, match=f"masked {name} is not what its model's id stands for"):
                parties.client(fresh=True).connect()
        assert parties.client(fresh=True).connect().lowered.setup.items[name] == sent
