"""A client of two parties alone, with real ciphertexts, computes with weights that stay on its disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from privinf.client.conversation import Conversation
from privinf.session.sealed import KeptPart
from protocols.errors import ConfigError
from tests.support import trio as t
from tests.support.duo import duo

PROMPT = [1, 2, 3]


def test_what_is_computed_with_stays_on_the_disk(tmp_path: Path) -> None:
    """A session goes on with what it has opened when another has removed it; cut, it is one line."""
    with duo(cache=tmp_path / "server", plain=False) as pair:
        client = pair.client(cache=tmp_path / "client")
        with Conversation(client) as talk:
            assert all(isinstance(weight.stored, KeptPart) for forms in talk.session.lines.masked.values() for weight in forms.values())
            for path in (tmp_path / "client").glob("setup/*/*/*.bin"):
                path.unlink()
            assert t.is_greedy(PROMPT, [token.id for token in talk.generate(PROMPT, max_new_tokens=1, ignore_eos=True)])
        with Conversation(client) as talk:
            for path in (tmp_path / "client").glob("setup/*/*/*.bin"):
                os.truncate(path, 100)
            with pytest.raises(ConfigError, match="was cut while it was used; remove it"):
                list(talk.generate(PROMPT, max_new_tokens=1, ignore_eos=True))
