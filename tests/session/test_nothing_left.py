"""What a session held is gone when it ends, not when Python's collector comes: that may take a hundred sessions."""

from __future__ import annotations

import gc
import logging
import os
import platform
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from privinf.client.session import ClientSession
from privinf.session.memory import give_back
from privinf.transport.connection import Connection
from tests.support import trio as t
from tests.support.trio import trio


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
        t.wait_for(lambda: not [one for one in made if one() is not None], about=lambda: str([one() for one in made if one() is not None]))
        assert tensors() <= before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_goes_back() -> None:
    """Blocks that are freed between blocks that stay: the allocator would keep them."""

    def resident() -> int:
        pages: str = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    freed, kept = [], []
    for _ in range(1500):
        freed.append(b"x" * 100_000)
        kept.append(b"x" * 1000)
    give_back()
    before = resident()
    freed.clear()
    give_back()
    assert before - resident() > 100_000_000 and len(kept) == 1500
