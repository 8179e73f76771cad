"""What a probe of the client's side is told of its peers, and that it leaves nothing behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from privinf.client.look import missing
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.trio import trio


def test_it_says_who_is_away_and_begins_no_session(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "privinf")
    with trio(cache=tmp_path) as parties:
        peers, model = parties.client().peers, t.lowered().id
        assert missing(peers, model) == ""
        t.wait_for(lambda: not parties.dealer.peers and not parties.server.peers)
        assert "another model" in missing(peers, "0" * 64)
        parties.dealer.close()
        assert missing(peers, model).startswith(f"the dealer at {parties.dealer.address} cannot be reached")
        parties.server.close()
        assert missing(peers, model).startswith(f"the server at {parties.server.address} cannot be reached")
        for service in (parties.dealer, parties.server):
            assert not service.counters.refusals and not service.counters.counts["passes"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


def test_the_two_alone_need_nobody_else(tmp_path: Path) -> None:
    with duo(cache=tmp_path) as parties:
        assert missing(parties.client().peers, t.lowered().id) == ""
