"""What a session held is gone when it ends, not when Python's collector comes: that may take a hundred sessions."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from privinf.party.session import ClientSession
from privinf.transport.connection import Connection
from tests import trio as t
from tests.trio import trio


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the collector, and without pytest's records of what is logged, which hold errors and so all that their frames held."""
    gc.collect()
    gc.disable()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("whole", [True, False], ids=["to its end", "left in the middle"])
def test_a_session_leaves_no_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    made: list[weakref.ref[object]] = []
    for kind in (Connection, ClientSession):
        begin = kind.__init__

        def watched(self: object, *arguments: object, begin: object = begin, **more: object) -> None:
            made.append(weakref.ref(self))
            begin(self, *arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(kind, "__init__", watched)

    def tensors() -> int:
        return sum(1 for found in gc.get_objects() if type(found) is torch.Tensor)

    with trio(cache=tmp_path) as parties:
        list(parties.client().generate(ids=[1, 2, 3], max_new_tokens=4, ignore_eos=True))  # what is kept between sessions
        t.wait_for(lambda: not parties.server.peers and not parties.dealer.peers)
        before = tensors()
        tokens = parties.client().generate(ids=[1, 2, 3], max_new_tokens=4, ignore_eos=True)
        for _ in tokens:
            if not whole:
                break
        tokens.close()  # type: ignore[attr-defined]
        del tokens
        t.wait_for(lambda: not parties.server.peers and not parties.dealer.peers)
        assert len(made) == 2 * (3 * 2 + 1)  # three connections, at both ends, and the client's session
        t.wait_for(lambda: not [one for one in made if one() is not None], 10, lambda: str([one() for one in made if one() is not None]))
        assert tensors() <= before
