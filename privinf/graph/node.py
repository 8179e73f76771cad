"""What every node of a lowered graph is: a CrypTen module that says all that is to be known of its operator.

A node knows its name, its layer, its attributes (public, small, JSON) and its parameters (the server's weights: float32 tensors there,
only shapes at the client). What the rest of the house asks it is declared on `Node`, with the answer that holds for most operators;
an operator is one file of `privinf/ops`, and is known as soon as its class is defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from privinf.crypten_adapter import Module, PrivateValue
from privinf.graph.info import Info
from privinf.graph.planning import INPUT_FRAC, PassingPlan, Planning, Shown, Wanted, power_of_two
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import Kept, PrivinfTensor, Runtime
from protocols.errors import ConfigError, RangeError
from protocols.linear import Weight
from protocols.memo import aside
from protocols.party import Party, Protocol_
from protocols.ring import encode
from protocols.shares import Shares
from protocols.truncation import rescale

Shape = tuple[int, ...]
Affine = tuple[Tensor, Tensor | None]

NODE_KINDS: dict[str, type[Node]] = {}


class Node(Module):
    """Base of all nodes. Keyword arguments are its attributes and its parameters; a parameter is a tensor or just its shape.

    More than a dozen attributes: each is a question that some pass over a graph asks of every operator, answered here for most.
    """

    op: ClassVar[str] = ""
    arity: ClassVar[int | None] = 1  # inputs; None: any number from 1
    required: ClassVar[tuple[str, ...]] = ()  # parameters
    optional: ClassVar[tuple[str, ...]] = ()
    encoded: ClassVar[tuple[str, ...]] = ()  # of them, those that the client holds masked; S adds the others to its shares
    server_only: ClassVar[tuple[str, ...]] = ()  # attributes into which a private number may have been folded, and that C does not need
    state: ClassVar[tuple[str, ...]] = ()  # what it keeps between tokens
    taped: ClassVar[bool] = False  # whether that is rows which `Recording` moves on, so that a further token's pass may be replayed
    peaks_kept: ClassVar[tuple[str, ...]] = ()  # measured parts of which the ranges hold the largest itself too, as `PART_seen`
    summed: ClassVar[tuple[str, ...]] = ()  # measured parts that the plan takes as often as a context is long, so that no input need repeat
    inexact: ClassVar[Mapping[str, str]] = {}  # what of it is rounded, and the method that makes that of floats: `privinf.lowering.gains`
    reads_ids: ClassVar[bool] = False  # token ids are what it reads, not a private value
    opens: ClassVar[Literal["product", "value"] | None] = (
        None  # what it reads: as the map that made it leaves it, or at `FRAC` fraction bits
    )
    precision: ClassVar[int] = INPUT_FRAC  # fraction bits of what it makes, where a linear map reads that
    batches: ClassVar[bool] = False  # whether it takes the rows of several sequences as such, `Runtime.batch`; what is rowwise does anyhow
    takes_last_position: ClassVar[bool] = False  # and nothing else: its readers read what it reads
    moves: ClassVar[bool] = False  # elements, and nothing else: what it makes has the fraction bits of what it reads
    any_frac: ClassVar[bool] = False  # what it makes has the ring and fraction bits of its one reader, where that says which
    multiplies: ClassVar[bool] = False  # whatever fraction bits its inputs have, in a ring that is planned for them
    tied_to: str | None = None  # a table whose transpose its weight is: one weight, encoded and masked once
    shared_with: str | None = None  # an earlier node whose weight is this one's too, not transposed: again encoded and masked once

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """What the graph file holds of this node besides name, layer, inputs and parameter shapes."""

    class Plan(PassingPlan, frozen=True):
        """This node's part of the ring plan."""

    plan: AnyPlan

    def __init__(self, name: str, layer: str = "", **values: Any) -> None:
        super().__init__()
        self.name = name
        self.layer = layer
        self.parameter_shapes: dict[str, Shape] = {}
        for key in (*self.required, *self.optional):
            value = values.pop(key, None)
            if value is None:
                if key in self.required:
                    raise ConfigError(f"{self.op} node needs the parameter {key}", layer=name)
            elif isinstance(value, torch.Tensor):
                value = value.detach().to(torch.float32)
                value = value if values.get("tied_to") else value.contiguous()  # a tied weight stays a view of its table
                self.parameter_shapes[key] = tuple(value.shape)
                self.register_parameter(key, value, requires_grad=False)
            else:
                self.parameter_shapes[key] = tuple(int(size) for size in value)
        try:
            attributes = msgspec.convert(values, self.Attributes)
        except msgspec.ValidationError as error:
            raise ConfigError(f"attributes of {self.op} node: {error}", layer=name) from None
        for key in attributes.__struct_fields__:
            setattr(self, key, getattr(attributes, key))
        self.check()
        self.eval()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.op:
            NODE_KINDS[cls.op] = cls

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key} {list(shape)}" for key, shape in self.parameter_shapes.items())
        return f"{type(self).__name__}({self.name}{': ' + shapes if shapes else ''})"

    # ---- attributes and parameters

    def check(self) -> None:
        """Raise ConfigError where attributes and parameter shapes contradict each other."""

    def fail(self, message: str) -> ConfigError:
        """What is wrong with this node, to be raised."""
        return ConfigError(f"{self.op} node: {message}", layer=self.name)

    def misfits(self, info: Info) -> Iterator[str]:
        """What is wrong with this node in a model for any length of which this is said."""
        yield from ()

    def attributes(self) -> dict[str, Any]:
        """The public attributes as JSON values."""
        return {key: msgspec.to_builtins(getattr(self, key)) for key in self.Attributes.__struct_fields__}

    @classmethod
    def from_attributes(cls, name: str, layer: str, attributes: dict[str, Any], parameters: dict[str, Any]) -> Node:
        """Rebuild a node; `parameters` are tensors (server) or shapes (client)."""
        known, fields = {*cls.required, *cls.optional}, set(cls.Attributes.__struct_fields__)
        for what, given, allowed in (("parameters", set(parameters), known), ("attributes", set(attributes), fields)):
            if not given <= allowed:
                raise ConfigError(f"{cls.op} node has {what} {sorted(allowed)}, not {sorted(given - allowed)}", layer=name)
        return cls(name, layer, **attributes, **parameters)

    @property
    def label(self) -> tuple[str, str]:
        """(layer, operator within it), what bytes and seconds are attributed to."""
        return self.layer, self.name.removeprefix(f"{self.layer}.") if self.layer else self.name

    @property
    def has_values(self) -> bool:
        """Whether the weights themselves are here, not only their shapes."""
        return all(key in self._parameters for key in self.parameter_shapes)

    def value(self, key: str) -> Any:
        """A parameter: float32 tensor (or stock CrypTen share in an encrypted copy)."""
        if key not in self._parameters:
            raise self.fail(f"the parameter {key} is not here: this graph came without weights")
        return self._parameters[key]

    def encoded_value(self, key: str) -> Any:
        """A parameter as it is encoded, where the plan has public factors of its columns."""
        return self.value(key)

    def as_planned(self, output: Tensor) -> Tensor:
        """The node's value, of floats, as its shares have it: with the factors that its plan has."""
        return output

    def maybe(self, key: str) -> Any:
        """An optional parameter, or None if this node has none."""
        return self.value(key) if key in self.parameter_shapes else None

    @property
    def own_parameters(self) -> list[str]:
        """All but a weight that is another node's."""
        return [key for key in self.parameter_shapes if lender(key, self.tied_to, self.shared_with) is None]

    # ---- shapes, and what may be done with the node in a graph

    def output_shape(self, *shapes: Shape) -> Shape:
        """The shape of the output for inputs of these shapes; ConfigError where they do not fit."""
        return shapes[0]

    @property
    def rowwise(self) -> bool:
        """Whether it treats each row (all axes but the last) by itself, and all alike."""
        return False

    @property
    def any_length(self) -> bool:
        """Whether it treats positions by the length that it finds, so that it may be part of a graph for any length."""
        return self.rowwise

    def moves_rows(self, before: Shape, after: Shape) -> bool:
        """Whether it only moves whole rows: what is rowwise may then be done before it as well as after it."""
        return False

    def for_rows(self, lead: Shape, width: int) -> dict[str, Any]:
        """Its attributes where it moves rows of this width to (*lead, width)."""
        return self.attributes()

    def affine(self, width: int) -> Affine | None:
        """(factor, term), float64, if it computes x * factor + term with vectors along the last axis, of this width."""
        return None

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        """Whether a score that is masked before it is masked after it."""
        return False

    def last_position_of(self) -> Node | None:
        """The node that computes only the last position of what this one computes, if there is one."""
        return None

    # ---- floats, stock CrypTen, shares

    def forward(self, *inputs: Any) -> Any:
        """On a private value the node's protocol, on any other tensor its `generic` body."""
        return self.run(*inputs) if isinstance(inputs[0], PrivateValue) else self.generic(*inputs)

    def generic(self, x: Any, *others: Any) -> Any:
        """The operator in tensor methods that torch and stock CrypTen share."""
        raise NotImplementedError(f"{self.op} has no body for floats")

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        """The operator on shares: its `protocol`, under its label. What moves no byte may override this instead."""
        return x.run(self.label, self.protocol(x, *others))

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        """Makes this party's shares of the output, in the ring of the node's plan."""
        raise NotImplementedError(f"{self.op} has no protocol (node {self.name})")

    def canonical(self, party: Party, x: Shares) -> Protocol_[Shares]:
        """x in the ring in which values travel between nodes."""
        bits, frac = self.plan.bits, self.plan.frac
        return (yield from rescale(party, x, bits=bits, frac=frac)) if (x.bits, x.frac) != (bits, frac) else x

    def constant_of(self, runtime: Runtime, key: str, frac: int) -> Tensor | None:
        """S's encoded parameter, which it adds to its share; None at C."""
        if not runtime.party.is_server or key not in self.parameter_shapes:
            return None
        found = runtime.constants.get((self.name, key, frac))
        if found is None:
            with aside():
                found = runtime.constants[self.name, key, frac] = encode(self.encoded_value(key).to(runtime.device), frac)
        return found

    def keep(self, runtime: Runtime, **parts: Kept) -> None:
        """Hold what the node declares as its `state` until the next token."""
        assert tuple(parts) == self.state, "a node keeps what it declares"
        runtime.state[self.name] = parts

    # ---- the ring plan

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What calibration is to find the largest size of, besides `out`: (part, value) of a run on floats."""
        yield from ()

    def bound_of(self, part: str, ranges: Mapping[str, float]) -> float:
        """The size up to which the plan holds a measured part; infinity where it does not depend on the inputs."""
        return ranges.get(part, float("inf"))

    def name_of(self, part: str) -> str:
        """A measured part, in words."""
        return "a value" if part == "out" else f"a value in {part}"

    def make_plan(self, planning: Planning) -> AnyPlan:
        """This node's part of the ring plan; RangeError where a value cannot fit."""
        return self.Plan(bits=planning.bits, frac=planning.frac)

    def wants(self, planning: Planning, maker: str) -> Wanted:
        """Of a node that opens what it reads: what it wants of `maker`, the linear map that makes it."""
        raise NotImplementedError(f"{self.op} opens {self.opens} and does not say how wide")

    def unfit(self, planning: Planning) -> RangeError:
        """What is to be said where no ring has that headroom."""
        return RangeError("what it opens does not fit a ring of 64 bits", layer=self.name)

    def encoding(self, key: str) -> tuple[int, int, bool]:
        """Of an encoded parameter: its ring, its fraction bits, and whether its entries are small (`protocols.linear.Weight`)."""
        raise NotImplementedError(f"{self.op} does not say how {key} is encoded")

    def weights(self) -> dict[str, Weight]:
        """The public records of the encoded parameters; one that is another node's is its."""
        own = self.own_parameters
        keys = [key for key in self.encoded if key in own]
        return {key: Weight(f"{self.name}.{key}", self.parameter_shapes[key], *self.encoding(key)) for key in keys}

    # ---- what `explain` shows

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        """The wires within the node: `own` are its ranges, `source` that of what it reads."""
        yield from ()

    def wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        """Weights, inner wires, and the output."""
        for key, weight in self.weights().items():
            yield Shown(key, weight.bits, weight.frac, self.largest(key), "weights")
        yield from self.inner_wires(own, source)
        if self.plan.output is not None:
            yield Shown("output", *self.plan.output, *self.output_bound(own))

    def output_bound(self, own: Mapping[str, float]) -> tuple[float | None, str | None]:
        """The largest output that the plan provides for, and what that follows from (None: the calibration)."""
        return own.get("out"), None

    def largest(self, key: str) -> float | None:
        """The largest size of a parameter's entries, as a power of two; None where the weights are not."""
        return power_of_two(float(self.value(key).abs().max())) if self.has_values else None


def lender(key: str, tied_to: str | None, shared_with: str | None) -> str | None:
    """The node whose parameter `key` is, if it is another's than the one that has these attributes."""
    return (tied_to or shared_with) if key == "weight" else None


def broadcast(node: Node, *shapes: Shape) -> Shape:
    """The common shape of values of these shapes."""
    result: list[int] = []
    for axis in range(-max(len(shape) for shape in shapes), 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        if len(sizes) > 1:
            raise node.fail(f"shapes {[list(shape) for shape in shapes]} do not broadcast")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)
