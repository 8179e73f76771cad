"""Every file of `privinf.ops` is an operator, whole, and known because it is there."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import privinf.ops
from privinf.graph.builder import RECOGNISERS, TABLE
from privinf.graph.node import NODE_KINDS, Node
from privinf.graph.planning import Plan

FILES = [found.name for found in pkgutil.iter_modules(privinf.ops.__path__)]


def overrides(kind: type[Node], *methods: str) -> bool:
    return any(getattr(kind, method) is not getattr(Node, method) for method in methods)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_an_operator(name: str) -> None:
    room = f"privinf.ops.{name}"
    importlib.import_module(room)
    (kind,) = [kind for kind in NODE_KINDS.values() if kind.__module__ == room or kind.__module__.startswith(f"{room}.")]
    assert kind.op == name and kind.__doc__


def test_every_operator_has_a_file() -> None:
    assert sorted(NODE_KINDS) == sorted(FILES)


@pytest.mark.parametrize("op", sorted(NODE_KINDS))
def test_an_operator_says_all_that_is_asked_of_it(op: str) -> None:
    kind = NODE_KINDS[op]
    assert overrides(kind, "generic") and overrides(kind, "run", "protocol")
    assert overrides(kind, "output_shape") or kind.arity == 1  # then its input's shape is its output's
    assert issubclass(kind.Plan, Plan) and kind.Plan.__struct_config__.forbid_unknown_fields and kind.Plan.__struct_config__.frozen
    assert {"bits", "frac"} <= set(kind.Plan.__struct_fields__)
    assert overrides(kind, "make_plan") or kind.Plan.__struct_fields__ == ("bits", "frac")
    assert set(kind.encoded) <= {*kind.required, *kind.optional} and (not kind.encoded or overrides(kind, "encoding"))
    assert kind.opens is None or overrides(kind, "wants")
    assert set(kind.server_only) <= set(kind.Attributes.__struct_fields__)


def test_rules_stand_with_their_operators_or_are_spellings() -> None:
    importlib.import_module("privinf.lowering.export")
    functions: list[Any] = [function for rules in TABLE.values() for function in rules]
    functions += [function for recognisers in RECOGNISERS.values() for function in recognisers]
    rooms = {function.__module__ for function in functions}
    assert all(room == "privinf.lowering.spellings" or room.startswith("privinf.ops.") for room in rooms), rooms
