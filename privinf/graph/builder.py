"""How operators are recognised: rules for ATen operators, recognisers for whole regions, and what both work with.

A rule gets a `Builder`, then the ATen operator's arguments: a `Value` is a private value, a `Constant` a tensor that does not depend on
the inputs, everything else is a Python value. It returns a `Value` (or a tuple of them), `NotImplemented` where this use is another
rule's, or raises `Unsupported`. Operators all of whose arguments are constants never reach a rule: they are evaluated once.

A recogniser rewrites the draft once it is whole, for what only the operators around it tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from privinf.graph.draft import Draft, layer_of
from privinf.graph.node import Node, Shape, broadcast

aten = torch.ops.aten

MAX_COPIES = 64  # a broadcast along an axis is written as this many copies at most

Rule = TypeVar("Rule", bound=Callable[..., Any])
TABLE: dict[Any, list[Callable[..., Any]]] = {}

Recogniser = Callable[[Draft], None]
RECOGNISERS: dict[bool, list[Recogniser]] = {False: [], True: []}  # before and after the linear maps are folded


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for these ATen overloads."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            TABLE.setdefault(operator, []).append(function)
        return function

    return register


def recogniser(*, folded: bool) -> Callable[[Recogniser], Recogniser]:
    """Register a recogniser, to run before or after constants and neighbouring linear maps have gone into the weights."""

    def register(function: Recogniser) -> Recogniser:
        RECOGNISERS[folded].append(function)
        return function

    return register


class Unsupported(Exception):
    """This use of an operator has no node; the reason is the message."""


@dataclass(frozen=True)
class Value:
    """A private value of the graph under construction."""

    key: str
    shape: Shape
    is_ids: bool = False


@dataclass(frozen=True)
class Constant:
    """A tensor known at lowering. `private`: computed from parameters or buffers, so it must not be public."""

    tensor: Tensor
    private: bool

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        return tuple(self.tensor.shape)


class Builder:
    """Emits nodes for the ATen operator that is being lowered."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.path = ""
        self.result_shape: Shape = ()  # of the operator that is being lowered, as the exporter knows it

    def apply(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """What the rules make of an operator; Unsupported if it has none for this use."""
        for function in TABLE.get(operator, ()):
            found = function(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        raise Unsupported("no rule takes these operands")

    def emit(self, kind: type[Node], *inputs: Value, **values: Any) -> Value:
        """The value of a new node."""
        if any(wire.is_ids for wire in inputs) and not kind.reads_ids:
            raise Unsupported("arithmetic on token ids")
        label = kind.op or "mask"
        node = kind(f"{self.path}.{label}" if self.path else label, layer_of(self.path), **values)
        key = self.draft.add(node, [wire.key for wire in inputs])
        return Value(key, self.draft.shapes[key])

    def source(self, x: Value) -> Value:
        """What the node that made a value read first."""
        key = self.draft.reads[x.key][0]
        return Value(key, self.draft.shapes[key])

    def by_rows(self, kind: type[Node], x: Value, **values: Any) -> Value:
        """Emit a node that treats each row alike, before what only moves rows rather than after it.

        Reshapes and permutations so move down until they meet their inverse: exporters wrap matrix products in pairs of them.
        """
        producer = self.draft.producer(x.key)
        if producer is None or not producer.moves_rows(self.source(x).shape, x.shape):
            return self.emit(kind, x, **values)
        y = self.by_rows(kind, self.source(x), **values)
        return self.emit(type(producer), y, **producer.for_rows(x.shape[:-1], y.shape[-1]))


def broadcast_shape(*shapes: Shape) -> Shape:
    """The common shape of values of these shapes."""
    return broadcast(Node("broadcast"), *shapes) if any(shapes) else ()


def as_number(value: Constant | float) -> float | None:
    """The number that a public constant is, if it is one; None for tensors and for what comes from weights."""
    if not isinstance(value, Constant):
        return float(value)
    return None if value.private or value.tensor.numel() != 1 else float(value.tensor)


def as_value(value: Any) -> Value:
    """A private value; Unsupported if it is a constant."""
    if not isinstance(value, Value):
        raise Unsupported("a constant where a private value is expected")
    return value


def as_constant(value: Any) -> Tensor:
    """A constant's tensor; Unsupported if it is a private value."""
    if not isinstance(value, Constant):
        raise Unsupported("a private value where a constant is expected")
    return value.tensor


def times(value: Constant | float, factor: float) -> Constant | float:
    """A constant operand times a number (for `alpha` and `beta` arguments)."""
    return Constant(value.tensor * factor, value.private) if isinstance(value, Constant) else value * factor
