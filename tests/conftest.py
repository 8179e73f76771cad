"""Settings of all tests, and the parties that many of them share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# a busy machine is slow, and that is no failure
settings.register_profile("privinf", deadline=None)
settings.load_profile("privinf")


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `Trio` with a cache of its own, for as long as a file's tests take."""
    from tests.support.trio import trio  # which loads much: only where it is used

    with trio(cache=tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_handler_of_a_command() -> Iterator[None]:
    """A command that ran in this process logs to a standard error that is gone: the tests after it do not."""
    yield
    root = logging.getLogger()
    for handler in [each for each in root.handlers if type(each) is logging.StreamHandler]:
        root.removeHandler(handler)
