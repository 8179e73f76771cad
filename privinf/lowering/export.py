"""From a `torch.nn.Module` to a lowered graph: `torch.export`, the table, the passes.

Parameters, buffers and everything computed from them alone are evaluated here, in float32; only what depends on the inputs
becomes nodes. What has no rule is collected, so that one error names all of it.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

import privinf.lowering.table_layout  # registers its rules
import privinf.lowering.table_nonlinear  # noqa: F401  likewise
from privinf.crypten_adapter import Graph
from privinf.lowering.builder import Builder, Constant, Unsupported, Wire
from privinf.lowering.draft import Draft
from privinf.lowering.lowered import Info, InputSpec, Lowered, finish_lowering
from privinf.lowering.nodes import Reshape
from privinf.lowering.passes import run_passes
from privinf.lowering.table import TABLE
from protocols.errors import ConfigError, UnsupportedOpError

aten = torch.ops.aten

# Operators that are only other spellings of operators in the table: the exporter takes these apart, nothing else, so that an
# unsupported operator is reported under the name that its module used.
SPELLED_OUT = (aten.einsum.default, aten.tensordot.default, aten.inner.default, aten.outer.default, aten.kron.default)

# Operators without a result that check what the exporter already knows.
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)


def lower(module: nn.Module, example_inputs: Any, *, headroom: float = 4.0) -> Lowered:
    """Lower a module for inputs of the shapes of `example_inputs` (a tensor or a tuple of tensors, floats or token ids).

    The module runs in evaluation mode. The example also calibrates the value ranges, so it should be typical; each range is
    the largest magnitude seen times `headroom`, rounded up to a power of two. Raises UnsupportedOpError with every operator
    that has no protocol, ConfigError where module and example do not fit each other.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ConfigError("example_inputs must be a tensor or a tuple of tensors")
    with evaluation_mode(module), torch.no_grad():
        try:
            expected = module(*inputs)
        except Exception as error:
            raise ConfigError(f"the module does not run on the example inputs: {first_line(error)}") from error
        graph = lower_graph(module, inputs)
    if isinstance(expected, tuple | list) and len(expected) == 1:
        expected = expected[0]
    check_equal(graph, inputs, expected)
    specs = tuple(
        InputSpec(name, "float" if value.is_floating_point() else "ids", tuple(value.shape))
        for name, value in zip(graph.input_names, inputs, strict=True)
    )
    info = Info(variant="module", inputs=specs, output=tuple(expected.shape))
    return finish_lowering(graph, info, [[value.cpu() for value in inputs]], headroom=headroom)


def lower_graph(module: nn.Module, inputs: Sequence[Tensor], last_position: bool = False) -> Graph:
    """The CrypTen graph of a module in evaluation mode. `last_position`: of a module whose output is (B, T, ...), only (B, ...)."""
    draft = Walk(module, tuple(inputs)).run()
    run_passes(draft, last_position)
    return draft.finish()


def check_equal(graph: Graph, inputs: Sequence[Tensor], expected: Any) -> None:
    """Hold the graph on floats against the module: a lowering that changes the function must not leave this house."""
    if not isinstance(expected, Tensor):
        raise UnsupportedOpError("the module must return one tensor")
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
        raise UnsupportedOpError(
            "the lowered graph does not compute what the module computes",
            remedy="the module may depend on its inputs' values or draw random numbers",
        )


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


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

    def run(self) -> Draft:
        self.read_inputs()
        result: Any = None
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self.call(node)
            elif node.op == "output":
                result = self.operand(node.args[0])
            elif node.op == "get_attr":
                self.failures[f"{path_of(node) or 'top'}: control flow on private values"] = None
        if self.failures:
            listed = "; ".join(self.failures)
            raise UnsupportedOpError(
                f"unsupported operators ({len(self.failures)}): {listed}", remedy="every operator that has a protocol is in the docs"
            )
        kinds = [spec.kind for spec in self.program.graph_signature.output_specs]
        if any(kind != OutputKind.USER_OUTPUT for kind in kinds):
            raise UnsupportedOpError("the module changes its buffers or inputs in place")
        if len(result) != 1 or not isinstance(result[0], Wire | Constant):
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
                self.values[node] = Wire(self.draft.add_input(node.name, shape), shape, is_ids=not value.is_floating_point())
            else:
                tensor = tensors.get(spec.target or "")
                if not isinstance(tensor, Tensor):
                    raise UnsupportedOpError(f"the constant {spec.target} is not a tensor")
                self.values[node] = constant(tensor, private=spec.kind in (InputKind.PARAMETER, InputKind.BUFFER))

    def operand(self, argument: Any) -> Any:
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
        self.builder.result_shape = tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()
        operands = list(leaves([*args, *kwargs.values()]))
        try:
            if (
                isinstance(target, torch._ops.OpOverload)
                and torch.Tag.nondeterministic_seeded in target.tags
                and not harmless(target, args)
            ):
                raise Unsupported("draws random numbers")
            if not any(isinstance(value, Wire) for value in operands):
                return evaluate(target, args, kwargs, any(isinstance(value, Constant) and value.private for value in operands))
            if target not in TABLE:
                raise Unsupported("")
            if any(isinstance(value, Wire) and value.is_ids for value in operands) and becomes_float(node):
                raise Unsupported("token ids used as numbers")
            return TABLE[target](self.builder, *args, **kwargs)
        except (Unsupported, ConfigError, TypeError) as error:
            self.failures[f"{self.where(node)}{': ' + str(error) if str(error) else ''}"] = None
            return self.placeholder(value)

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
            shape = tuple(int(size) for size in value.shape)
            key = self.draft.add_input(f"missing{len(self.draft.inputs)}", shape)
            return Wire(key, shape)
        return tuple(self.placeholder(part) for part in value) if isinstance(value, list | tuple) else value


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """`torch.export`, free of in-place operators and of the spellings that the table does not hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program: ExportedProgram = torch.export.export(module, inputs, strict=False)
            if any(must_be_rewritten(node.target) for node in program.graph.nodes):
                known = torch.export.default_decompositions()
                program = program.run_decompositions({op: known[op] for op in SPELLED_OUT if op in known})
            return program
        except Exception as error:
            raise UnsupportedOpError(
                f"torch.export cannot trace the module: {first_line(error)}",
                remedy="its control flow must not depend on the inputs' values",
            ) from error


def must_be_rewritten(target: Any) -> bool:
    """Whether the table needs the exporter to take an operator apart, or to turn one that works in place into one that does not."""
    in_place = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target is not aten.detach_.default
    return target in SPELLED_OUT or in_place


def path_of(node: torch.fx.Node) -> str:
    """The path of the module whose code called the operator."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def leaves(values: Sequence[Any]) -> Any:
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


def harmless(target: Any, args: Sequence[Any]) -> bool:
    """Dropout in evaluation mode and attention without dropout carry the tag, and draw nothing."""
    if target in (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return len(args) > 2 and args[2] is False
    if target is aten.scaled_dot_product_attention.default:
        return len(args) < 5 or args[4] == 0.0
    return False


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
