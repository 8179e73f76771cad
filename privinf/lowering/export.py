"""From a `torch.nn.Module` to a lowered graph: `torch.export`, the table, the passes.

Parameters, buffers and everything computed from them alone are evaluated here, in float32; only what depends on the inputs
becomes nodes. What has no rule is collected, so that one error names all of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind

import privinf.lowering.spellings
import privinf.ops  # noqa: F401  both register their rules
from privinf.crypten_adapter import Graph
from privinf.graph.builder import TABLE, Builder, Constant, Unsupported, Value
from privinf.graph.draft import Draft
from privinf.graph.info import Info, InputSpec
from privinf.lowering.lowered import Lowered, finish_lowering
from privinf.lowering.passes import run_passes
from privinf.lowering.trace import export, first_line, run_once
from privinf.ops.linear import tie_tables
from privinf.ops.reshape import Reshape
from protocols.errors import ConfigError, UnsupportedOpError

aten = torch.ops.aten

# Operators without a result that check what the exporter already knows.
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)


def lower(module: nn.Module, example_inputs: Any, *, headroom: float = 4.0) -> Lowered:
    """Lower a module for inputs of the shapes of `example_inputs` (a tensor or a tuple of tensors, floats or token ids).

    The module runs in evaluation mode. The example also calibrates the value ranges, so it should be typical; each range is
    the largest magnitude seen times `headroom`, rounded up to a power of two. Raises UnsupportedOpError with every operator
    that has no protocol, ConfigError where module and example do not fit each other.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"a {type(module).__name__} is no torch.nn.Module", remedy="wrap it in a module whose forward calls it")
    inputs = checked_inputs(example_inputs)
    with evaluation_mode(module), torch.no_grad():
        expected = one_tensor(run_once(module, inputs))
        graph = lower_graph(module, inputs)
    check_equal(graph, inputs, expected)
    specs = tuple(
        InputSpec(name, "float" if value.is_floating_point() else "ids", tuple(value.shape))
        for name, value in zip(graph.input_names, inputs, strict=True)
    )
    info = Info(variant="module", inputs=specs, output=tuple(expected.shape))
    return finish_lowering(graph, info, [[value.cpu() for value in inputs]], headroom=headroom)


def checked_inputs(given: Any) -> tuple[Tensor, ...]:
    """The example as a tuple of tensors; ConfigError names what is wrong with it."""
    inputs = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, tuple | list) else ()
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ConfigError("example_inputs must be a tensor or a tuple of tensors")
    for number, value in enumerate(inputs):
        if value.layout != torch.strided or value.numel() == 0:
            what = "has no elements" if value.layout == torch.strided else "is no dense tensor"
            raise ConfigError(f"the example input {number} {what}", remedy="give one as the module will get it")
        if not value.is_complex() and not bool(torch.isfinite(value).all()):
            raise ConfigError(f"a value of the example input {number} is not finite", remedy="give a typical input")
    return inputs


def one_tensor(returned: Any) -> Tensor:
    """What a module returns, where that is one tensor; UnsupportedOpError."""
    if isinstance(returned, tuple | list) and len(returned) == 1:
        returned = returned[0]
    if not isinstance(returned, Tensor):
        several = isinstance(returned, tuple | list)
        what = f"{len(returned)} values" if several else "None" if returned is None else f"a {type(returned).__name__}"
        raise UnsupportedOpError(f"the module returns {what}", remedy="it must return one tensor")
    return returned


def lower_graph(module: nn.Module, inputs: Sequence[Tensor], last_position: bool = False, *, alike: bool = False) -> Graph:
    """The CrypTen graph of a module in evaluation mode. `last_position`: of a module whose output is (B, T, ...), only (B, ...).

    `alike`: layers that share weights are lowered alike, whatever stands before them.
    """
    draft = Walk(module, tuple(inputs)).run()
    run_passes(draft, last_position, alike=alike)
    graph = draft.finish()
    tie_tables(graph)
    return graph


def check_equal(graph: Graph, inputs: Sequence[Tensor], expected: Tensor) -> None:
    """Hold the graph on floats against the module: a lowering that changes the function must not leave this house."""
    beyond: list[str] = []  # the nodes with a value whose square no float32 holds, or that is not finite, in order

    def observe(node: Any, operands: Any, output: Tensor) -> None:
        if not bool((output.abs() < 1e19).all()):
            beyond.append(node.name)

    found = graph(*(value.cpu().float() if value.is_floating_point() else value.cpu() for value in inputs), observe=observe)
    if not bool(torch.isfinite(expected).all()):
        raise ConfigError("a value is not finite", layer=beyond[0] if beyond else "", remedy="the weights or the inputs are too large")
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2  # the module's own, in half precision
    expected = expected.cpu().float()
    near = tolerance * (1 + float(expected.abs().max())) if expected.numel() else 0.0
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=near):
        if beyond:
            raise ConfigError("a value is too large for float32", layer=beyond[0], remedy="the weights or the inputs are too large")
        raise UnsupportedOpError(
            "the lowered graph does not compute what the module computes",
            remedy="the module may depend on its inputs' values or draw random numbers",
        )


class evaluation_mode:
    """Put a module into evaluation mode, and every part of it back into its own mode afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.before = {part: part.training for part in self.module.modules()}
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        for part, training in self.before.items():
            part.training = training


class Walk:
    """One pass over an exported program, operator by operator."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.program = export(module, inputs)
        self.draft = Draft()
        self.builder = Builder(self.draft)
        self.values: dict[torch.fx.Node, Any] = {}
        self.failures: dict[str, None] = {}  # a set that keeps its order
        self.lost = False  # what follows has no shape or value that is known here

    def run(self) -> Draft:
        """The whole program as a draft; LoweringError names every operator that has no rule."""
        self.read_inputs()
        result: Any = None
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self.call(node)
                if self.lost:
                    break
            elif node.op == "output":
                result = self.operand(node.args[0])
            elif node.op == "get_attr":
                self.failures[f"{path_of(node) or 'top'}: control flow on private values"] = None
        if self.failures:
            listed = "; ".join(self.failures)
            raise UnsupportedOpError(
                f"unsupported operators ({len(self.failures)}): {listed}", remedy="every operator that has a protocol is in the docs"
            )
        changed = [spec.target for spec in self.program.graph_signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
        if changed:
            raise UnsupportedOpError(f"the module changes its buffers or inputs in place: {', '.join(map(str, changed))}")
        if len(result) != 1 or not isinstance(result[0], Value | Constant):
            raise UnsupportedOpError(f"the module returns {len(result)} values", remedy="it must return one tensor")
        if isinstance(result[0], Constant):
            raise UnsupportedOpError("the module's output does not depend on its inputs")
        output = result[0]
        if output.key in self.draft.inputs:
            if output.is_ids:
                raise UnsupportedOpError("the module returns its token ids")
            output = self.builder.emit(Reshape, output, shape=list(output.shape))  # a graph has at least one node
        self.draft.output = output.key
        return self.draft

    def read_inputs(self) -> None:
        """Gives each placeholder its value: an input's wire, or a constant."""
        tensors: dict[str, Any] = {**self.program.state_dict, **self.program.constants}
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                value = node.meta["val"]
                if not isinstance(value, Tensor):
                    raise UnsupportedOpError(f"the input {node.name} is not a tensor")
                if value.dtype == torch.bool or value.is_complex():
                    raise UnsupportedOpError(f"the input {node.name} has dtype {str(value.dtype).removeprefix('torch.')}")
                shape = tuple(int(size) for size in value.shape)
                self.values[node] = Value(self.draft.add_input(node.name, shape), shape, is_ids=not value.is_floating_point())
            else:
                tensor = tensors.get(spec.target or "")
                if not isinstance(tensor, Tensor):
                    raise UnsupportedOpError(f"the constant {spec.target} is not a tensor")
                if tensor.is_complex():
                    raise UnsupportedOpError(f"{spec.target} has dtype {str(tensor.dtype).removeprefix('torch.')}")
                self.values[node] = constant(tensor, private=spec.kind in (InputKind.PARAMETER, InputKind.BUFFER))

    def operand(self, argument: Any) -> Any:
        """What a traced argument stands for: a value found before, parts of a sequence alike, or itself."""
        if isinstance(argument, torch.fx.Node):
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return [self.operand(part) for part in argument]
        return argument

    def call(self, node: torch.fx.Node) -> Any:
        """Evaluate, lower, or record as unsupported, one operator."""
        args = [self.operand(argument) for argument in node.args]
        kwargs = {key: self.operand(argument) for key, argument in node.kwargs.items()}
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if target in CHECKS:
            return None
        self.builder.path = path_of(node)
        value = node.meta.get("val")
        self.builder.result_shape = shape_of(value)
        operands = list(leaves([*args, *kwargs.values()]))
        try:
            if (
                isinstance(target, torch._ops.OpOverload)
                and torch.Tag.nondeterministic_seeded in target.tags
                and not harmless(target, args)
            ):
                raise Unsupported("draws random numbers")
            if not any(isinstance(value, Value) for value in operands):
                return evaluate(target, args, kwargs, any(isinstance(value, Constant) and value.private for value in operands))
            if target not in TABLE or is_symbolic(value):
                raise Unsupported("what follows depends on the inputs' values" if is_symbolic(value) else "")
            if any(isinstance(value, Constant) and value.tensor.is_complex() for value in operands):
                raise Unsupported("complex numbers")
            if any(isinstance(value, Value) and value.is_ids for value in operands) and becomes_float(node):
                raise Unsupported("token ids used as numbers")
            return self.builder.apply(target, *args, **kwargs)
        except (Unsupported, ConfigError, TypeError, ValueError, RuntimeError) as error:
            told = first_line(error) if isinstance(error, ValueError | RuntimeError) else str(error)
            self.failures[f"{self.where(node)}{told and f': {told}'}"] = None
            self.lost = is_symbolic(value)
            return None if self.lost else self.placeholder(value)

    def where(self, node: torch.fx.Node) -> str:
        """`h.0.ln_1 (LayerNorm): aten.layer_norm`"""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        kind = stack[-1][1] if stack else ""
        name = (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]
        target: Any = node.target
        label = f"aten.{target._opname}" if hasattr(target, "_opname") and target.namespace == "aten" else str(target)
        return f"{path_of(node) or 'top'}{f' ({name})' if name else ''}: {label}"

    def placeholder(self, value: Any) -> Any:
        """A stand-in for the result of an unsupported operator, so that the walk finds the others too."""
        if isinstance(value, Tensor):
            shape = shape_of(value)
            key = self.draft.add_input(f"missing{len(self.draft.inputs)}", shape)
            return Value(key, shape)
        return tuple(self.placeholder(part) for part in value) if isinstance(value, list | tuple) else value


def path_of(node: torch.fx.Node) -> str:
    """The path of the module whose code called the operator."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def is_symbolic(value: Any) -> bool:
    """Whether the exporter knows it, or its shape, only by a name: it depends on the inputs' values."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)


def shape_of(value: Any) -> tuple[int, ...]:
    """Empty for what is no tensor, or none of a known shape."""
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) and not is_symbolic(value) else ()


def leaves(values: Sequence[Any]) -> Any:
    """The values in nested sequences, in order."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


def harmless(target: Any, args: Sequence[Any]) -> bool:
    """Dropout in evaluation mode, attention without dropout and recurrent layers carry the tag, and draw nothing."""
    if target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return len(args) > 2 and args[2] is False
    if target is aten.scaled_dot_product_attention.default:
        return len(args) < 5 or args[4] == 0.0
    return target._opname in ("lstm", "gru", "rnn_tanh", "rnn_relu")  # which have no protocol anyway


def becomes_float(node: torch.fx.Node) -> bool:
    """Whether an operator on token ids gives numbers, other than by looking up rows."""
    value = node.meta.get("val")
    lookup = node.target in (aten.embedding.default, aten.index.Tensor)
    return not lookup and isinstance(value, Tensor) and value.is_floating_point()


def constant(tensor: Tensor, private: bool) -> Constant:
    """Floats of any width as float32; integers and booleans as they are."""
    tensor = tensor.detach().cpu()
    return Constant(tensor.float() if tensor.is_floating_point() else tensor, private)


def evaluate(target: Any, args: list[Any], kwargs: dict[str, Any], private: bool) -> Any:
    """Run an operator that does not depend on the inputs."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return value.tensor if isinstance(value, Constant) else value

    def wrap(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(wrap(part) for part in value)
        if private and isinstance(value, int | float):
            value = torch.tensor(value)  # `weight.item()` is no number in the code
        return constant(value, private) if isinstance(value, Tensor) else value

    options = {key: plain(value) for key, value in kwargs.items()}
    if "device" in options:
        options["device"] = torch.device("cpu")
    return wrap(target(*plain(args), **options))
