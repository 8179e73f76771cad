"""The one place that imports CrypTen.

CrypTen 0.4.1 does not import on torch 2.9 and later: its ONNX converter, which we never call, asks for a torch module that
moved. Importing this file makes the old name point at the new place first. Nothing imports this file before it is needed.

What the rest of the house uses:

- `crypten_module()`: the package itself, usable after the repair;
- `Module`, `Graph`: typed subclasses of `crypten.nn.Module` and `crypten.nn.Graph`;
- `PrivateValue`: the base of the tensor type on which a lowered graph runs on our own protocols. One graph runs on plain
  torch tensors, on stock CrypTen tensors and on a `PrivateValue`; each node asks which it was given.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast


def _repair_onnx_import() -> None:
    """Let `crypten.nn.onnx_converter` import on every torch: alias `torch.onnx._internal.registration` to where it went."""
    old = "torch.onnx._internal.registration"
    if old in sys.modules or importlib.util.find_spec(old) is not None:
        return
    try:
        sys.modules[old] = importlib.import_module("torch.onnx._internal.torchscript_exporter.registration")
    except ImportError:
        # A torch without any TorchScript exporter: the converter only needs the name to exist until it is called.
        stub = types.ModuleType(old)
        stub.__dict__["registry"] = None
        sys.modules[old] = stub


_repair_onnx_import()

import crypten  # noqa: E402
import crypten.nn  # noqa: E402

CrypTensor: Any = crypten.CrypTensor
stock: Any = crypten.nn  # CrypTen's own node classes, which ours subclass where they fit


def crypten_module() -> Any:
    """The `crypten` package, importable on the current torch."""
    return crypten


class PrivateValue(crypten.CrypTensor):  # type: ignore[misc]
    """A tensor on which a node runs its own protocol; a CrypTensor, so CrypTen's graphs accept it.

    A node that is given one runs on shares (`Node.run`), whatever the graph's state of encryption. A subclass registers itself with
    `CrypTensor.register_cryptensor("privinf")` and calls `super().__init__()`.
    """

    # CrypTensor looks into its configuration at every access to an attribute, for gradients and debugging that we do not have
    __getattribute__ = object.__getattribute__


class _AcceptsPrivateValues:
    """Mixed into both classes below: `forward` takes a `PrivateValue` whether or not the module is 'encrypted'.

    CrypTen refuses a CrypTensor in an unencrypted module, because its own protocols need shared weights. Ours keep the
    weights in the clear at the server alone, so the refusal does not apply; for stock tensors it stays.
    """

    def __getattribute__(self, name: str) -> Any:
        if name != "forward":
            return object.__getattribute__(self, name)
        guarded = super().__getattribute__

        def forward(*args: Any, **kwargs: Any) -> Any:
            private = any(isinstance(value, PrivateValue) for value in args)
            return (object.__getattribute__(self, name) if private else guarded(name))(*args, **kwargs)

        return forward


class Module(_AcceptsPrivateValues, crypten.nn.Module):  # type: ignore[misc]
    """`crypten.nn.Module` with the types that mypy sees."""

    encrypted: bool
    _parameters: dict[str, Any]


Observer = Callable[[Module, tuple[Any, ...], Any], None]


class Graph(_AcceptsPrivateValues, crypten.nn.Graph):  # type: ignore[misc]
    """`crypten.nn.Graph`, run in the order in which its nodes were added.

    Upstream searches the whole graph for the next computable node after each one, and a node that reads the same value twice
    (x + x) never becomes computable. Here the order of insertion is the order of execution (the validity rules check that it
    is topological), and a value is freed after its last reader.
    """

    input_names: list[str]
    output_names: list[str]
    _graph: dict[str, list[str]]
    _modules: dict[str, Any]
    encrypted: bool

    def __init__(self, input_names: Sequence[str], output_names: Sequence[str]) -> None:
        super().__init__(list(input_names), list(output_names))

    @property
    def nodes(self) -> list[Any]:
        """The nodes in order of execution."""
        return [self._modules[name] for name in self._graph]

    def named_nodes(self) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
        """(name, node, names of its inputs), in order of execution."""
        for name, inputs in self._graph.items():
            yield name, self._modules[name], tuple(inputs)

    def node(self, name: str) -> Any:
        """The node of this name; KeyError if there is none."""
        return self._modules[name]

    def append(self, node: Any, inputs: Sequence[str]) -> str:
        """Add `node` under its own name, reading `inputs`; return the name of its output, which is the node's."""
        self.add_module(node.name, node, list(inputs))
        return cast(str, node.name)

    def last_readers(self, only: Collection[str] | None = None) -> dict[str, list[str]]:
        """node name -> the values that nobody reads after it; where `only` these nodes run, among them."""
        last: dict[str, str] = {}
        for name, inputs in self._graph.items():
            if only is not None and name not in only:
                continue
            last[name] = name  # a value that nobody reads dies where it is made
            for value in inputs:
                last[value] = name
        frees: dict[str, list[str]] = {}
        for value, reader in last.items():
            if value not in self.output_names:
                frees.setdefault(reader, []).append(value)
        return frees

    def forward(
        self,
        *args: Any,
        observe: Observer | None = None,
        only: Collection[str] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run on torch tensors, stock CrypTen tensors or `PrivateValue`s. `observe(node, inputs, output)` sees every node.

        With `only`, a set of nodes and whatever they need beyond what is `given`, values by the names of their nodes, no other node runs,
        and an output that is not among them is None.
        """
        if len(args) != len(self.input_names):
            raise ValueError(f"the graph takes {len(self.input_names)} inputs, got {len(args)}")
        values: dict[str, Any] = dict(zip(self.input_names, args, strict=True)) | dict(given or {})
        frees = self.last_readers(only)
        for name, inputs in self._graph.items():
            if only is not None and name not in only:
                continue
            node = self._modules[name]
            operands = tuple(values[value] for value in inputs)
            output = node(*operands)
            if observe is not None:
                observe(node, operands, output)
            values[name] = output
            del operands, output
            for dead in frees.get(name, ()):
                values.pop(dead, None)
        results = tuple(values[name] if only is None else values.get(name) for name in self.output_names)
        return results[0] if len(results) == 1 else results

    def encrypted_copy(self, src: int = 0) -> Graph:
        """A copy whose parameters are stock CrypTen shares, held by party `src` before; `crypten.init()` must have been called."""
        twin = copy.deepcopy(self)
        twin.encrypt(src=src)
        return twin
