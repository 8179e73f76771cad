"""Every way to ask for a reply takes the same arguments, with the same defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from privinf.client.client import Client
from privinf.client.wanted import Wanted, Wishes
from privinf.local.session import LocalSession
from protocols.errors import ConfigError


def test_what_may_be_wished_is_what_is_wanted() -> None:
    wanted = {field.name: field.default for field in fields(Wanted)}
    assert get_type_hints(Wishes) == get_type_hints(Wanted)
    spelt_out = inspect.signature(Client.generate).parameters
    assert {name: spelt_out[name].default for name in wanted} == wanted
    assert set(spelt_out) == {"self", "prompt", "ids", "retry", *wanted}


@pytest.mark.parametrize(
    "ask", [lambda **wishes: Wanted(**wishes), lambda **wishes: next(LocalSession("nowhere").generate("abc", **wishes))]
)
def test_wishes_are_checked_where_they_are_said(ask: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="at least one new token"):
        ask(max_new_tokens=0)
    with pytest.raises(TypeError, match="tokens"):
        ask(tokens=3)
