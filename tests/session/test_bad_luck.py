"""Bad input and bad luck of a size or a moment: the smallest models, a context that is filled, a full disk, a dealer that comes back."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from privinf.lowering.explain import explain
from tests.support import trio as t
from tests.support.failures import LINE, failed, is_well, new_lines
from tests.support.faults import Fault, SmallFiles
from tests.support.ladder import LOGIT_ERROR, float_logits, logit_error, make, run

# ---- sizes


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM(t)+ScFuFFN"])
@pytest.mark.parametrize(
    ("positions", "vocabulary", "width", "heads"), [(1, 1, 4, 1), (1, 3, 4, 4), (2, 5, 6, 1), (16, 257, 9, 3)], ids=lambda value: str(value)
)
def test_small_and_odd_models(tmp_path: Path, variant: str, positions: int, vocabulary: int, width: int, heads: int) -> None:
    """One position, one token in the vocabulary, one head, heads of odd width, heads of width 1; the context is filled."""
    lowered, model = make(tmp_path, variant, n_positions=positions, vocab_size=vocabulary, n_embd=width, n_head=heads)
    ids = tuple(i * 7 % vocabulary for i in range(positions))
    assert logit_error(lowered, model, ids) < LOGIT_ERROR
    exact = float_logits(model, ids)
    token = int(run(lowered, ids, logits=False).client)
    assert float(exact.max() - exact[token]) < 2 * LOGIT_ERROR


# ---- moments


def test_a_disk_that_fills_during_set_up(tmp_path: Path) -> None:
    """One line at every party; what had been kept is kept, and the same command goes on from there once there is room."""
    cache, whole = tmp_path / "cache", explain(t.lowered())["total"]["setup_bytes"]
    with t.services() as services:
        said = len(services.server.lines)
        line = failed(services.generate("--cache", cache, hook=SmallFiles(10_000)), (2,))
        assert f"cannot write {cache}" in line and "File too large" in line and "free space" in line
        assert "client" in new_lines(services.server, said)[0]
        kept = [path for path in cache.rglob("setup/*/*") if path.is_file()]
        assert kept and all(path.suffix == ".bin" for path in kept)  # whole files alone
        again = services.generate("--cache", cache, "--json")
        assert again.wait() == 0, again.err
        result = json.loads(again.out)
        assert 0 < result["traffic"]["setup"]["payload"] < whole
        assert t.is_greedy([1, 2, 3], result["tokens"])


@pytest.mark.parametrize("point", [("server:offline", 4), ("client:offline", 6)], ids=lambda point: point[0])
def test_a_dealer_that_dies_in_the_middle_of_a_pass_and_comes_back(tmp_path: Path, point: tuple[str, int]) -> None:
    """The client's query ends in one line; the server stays up, and the next query is answered by the new dealer."""
    with t.services("--connect-timeout", 2, fault=Fault("dealer", *point)) as services:
        said = len(services.server.lines)
        line = failed(services.generate("--cache", tmp_path, "--max-new-tokens", 3), (3, 4))
        assert "dealer" in line or services.dealer_address in line
        assert services.dealer.wait() == -signal.SIGKILL
        new_lines(services.server, said)
        said = len(services.server.lines)
        assert LINE.fullmatch(failed(services.generate("--cache", tmp_path), (3,)))  # it is still away
        new_lines(services.server, said)
        services.dealer, _ = t.start_dealer(listen=t.address_of(services.dealer))
        assert is_well(services) and services.server.alive
        services.dealer.end()
