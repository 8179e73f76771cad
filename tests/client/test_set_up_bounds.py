"""What a client believes of a set-up, before it asks for any of it: a graph may say that a weight is as large as it likes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from privinf.client.sealed import receive_sealed
from privinf.files import check_room
from privinf.lowering.encrypted import Sealing
from privinf.lowering.setup import MAX_SETUP
from protocols.errors import ConfigError, HandshakeError
from protocols.lattice.weights import Form
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.trio import trio

PROMPT = [1, 2, 3]


@pytest.mark.parametrize("inner", [1, 7, 64, 4096, 5000])
@pytest.mark.parametrize("chosen", [False, True])
def test_a_size_is_that_of_all_parts(inner: int, chosen: bool) -> None:
    form = Form("w", inner, 96, 24, False, chosen)
    assert form.size == sum(form.part_sizes())


def test_a_table_without_end_is_not_believed_and_no_list_of_its_parts_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand million rows: listing their parts alone would take minutes and gigabytes."""

    def listed(form: Form) -> Any:
        raise AssertionError

    monkeypatch.setattr(Form, "part_sizes", listed)
    sealing = Sealing(t.lowered(), [Form("wte.embedding.weight", 1 << 31, 768, 16, chosen=True)])
    assert sealing.size > MAX_SETUP
    lines: Any = SimpleNamespace(peers=SimpleNamespace(named="server S"))
    with pytest.raises(HandshakeError, match=f"asks for a set-up of more than {MAX_SETUP} bytes"):
        receive_sealed(lines, None, t.lowered(), sealing)  # type: ignore[arg-type]


def test_there_is_room_or_one_line(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(ConfigError, match=r"are to be kept in .*yet, and its disk has \d+ left; make room, or choose another --cache"):
        check_room(tmp_path / "not" / "yet", 1 << 60)


@pytest.mark.parametrize("parties", [duo, trio])
def test_a_set_up_that_the_disk_has_no_room_for_is_not_asked_for(parties: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with parties(cache=tmp_path) as made:
        client = made.client(fresh=True)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ConfigError, match="has 1000 left"):
            next(iter(client.generate(ids=PROMPT, max_new_tokens=1)))
        assert not list(client.options.cache.rglob("setup/*/*.bin"))
        monkeypatch.undo()
