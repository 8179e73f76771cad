"""A measured network that the tests of the harness share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.measure import Run, interleave
from benchmarks.networks import Network, made
from benchmarks.schema import encode

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return made("SM(t)+ScFuFFN", tmp_path_factory.mktemp("network"), **TINY)


@pytest.fixture(scope="module")
def run(network: Network) -> Run:
    """Ours against stock CrypTen and float, one sample each."""
    found = Run("test")
    interleave(found, network, 5, ["privinf", "crypten", "plain"], samples=1, errors=1)
    return found


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "result.json"
    path.write_bytes(encode(run.result(True)))
    yield path
