"""The gateway that most of its tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gateway import Gateway, gateway
from tests.support.trio import Trio


@pytest.fixture(scope="module")
def door(parties: Trio) -> Iterator[Gateway]:
    with gateway(parties) as made:
        yield made
