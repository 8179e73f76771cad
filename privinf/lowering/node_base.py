"""What every node of a lowered graph is: a CrypTen module with one body for every kind of tensor.

A node's `generic` body is written in tensor methods that torch and stock CrypTen share; a `PrivateValue` is asked for its own
method of the same kind instead (`x.op_linear(node)`). A node knows its name, its layer, its attributes (public, small, JSON)
and its parameters (the server's weights: float32 tensors there, only shapes at the client). The kinds are in `nodes` and `layout_nodes`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import torch

from privinf.crypten_adapter import Module, PrivateValue
from protocols.errors import ConfigError

Shape = tuple[int, ...]

NODE_KINDS: dict[str, type[Node]] = {}


class Node(Module):
    """Base of all nodes. Keyword arguments are its attributes and its parameters; a parameter is a tensor or just its shape."""

    op: ClassVar[str] = ""
    arity: ClassVar[int | None] = 1  # inputs; None: any number from 1
    required: ClassVar[tuple[str, ...]] = ()  # parameters
    optional: ClassVar[tuple[str, ...]] = ()
    server_only: ClassVar[tuple[str, ...]] = ()  # attributes into which a private number may have been folded, and that C does not need

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """What the graph file holds of this node besides name, layer, inputs and parameter shapes."""

    def __init__(self, name: str, layer: str = "", **values: Any) -> None:
        super().__init__()
        self.name = name
        self.layer = layer
        self.plan: dict[str, Any] = {}
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

    def check(self) -> None:
        """Raise ConfigError where attributes and parameter shapes contradict each other."""

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.op} node: {message}", layer=self.name)

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
    def has_values(self) -> bool:
        """Whether the weights themselves are here, not only their shapes."""
        return all(key in self._parameters for key in self.parameter_shapes)

    def value(self, key: str) -> Any:
        """A parameter: float32 tensor (or stock CrypTen share in an encrypted copy)."""
        if key not in self._parameters:
            raise self.fail(f"the parameter {key} is not here: this graph came without weights")
        return self._parameters[key]

    def maybe(self, key: str) -> Any:
        """An optional parameter, or None if this node has none."""
        return self.value(key) if key in self.parameter_shapes else None

    def output_shape(self, *shapes: Shape) -> Shape:
        """The shape of the output for inputs of these shapes; ConfigError where they do not fit."""
        return shapes[0]

    def forward(self, *inputs: Any) -> Any:
        first = inputs[0]
        if isinstance(first, PrivateValue):
            return getattr(first, f"op_{self.op}")(self, *inputs[1:])
        return self.generic(*inputs)

    def generic(self, *inputs: Any) -> Any:
        raise NotImplementedError


def broadcast(node: Node, *shapes: Shape) -> Shape:
    """The common shape of values of these shapes."""
    result: list[int] = []
    for axis in range(-max(len(shape) for shape in shapes), 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        if len(sizes) > 1:
            raise node.fail(f"shapes {[list(shape) for shape in shapes]} do not broadcast")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)
