"""What makes a lowered graph valid: a table of rules, held after lowering and after every load.

A rule looks at the graph and its `Info` and yields a message for each fault. A graph may come from a peer, so rules also bound
what running it could allocate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from privinf.crypten_adapter import Graph
from privinf.graph.info import Info
from privinf.graph.node import NODE_KINDS, Node, Shape
from protocols.errors import ConfigError

MAX_NODES = 100_000
MAX_RANK = 12
MAX_ELEMENTS = 2**34  # of one value, at the longest input
NAME = re.compile(r"[A-Za-z0-9_.+\-]{1,256}")


@dataclass(frozen=True)
class Rule:
    """What must hold of every graph: its name, and the faults that it finds."""

    name: str
    faults: Callable[[Graph, Info], Iterator[str]]


RULES: list[Rule] = []


def rule(function: Callable[[Graph, Info], Iterator[str]]) -> Callable[[Graph, Info], Iterator[str]]:
    """Registers a rule, under the function's name in words; in the order of this file."""
    RULES.append(Rule(function.__name__.replace("_", " "), function))
    return function


def check_graph(graph: Graph, info: Info) -> None:
    """Raise ConfigError with the faults of the first rule that does not hold; later rules rely on earlier ones."""
    for item in RULES:
        faults = list(item.faults(graph, info))
        if faults:
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ConfigError(f"invalid graph, rule '{item.name}': " + "; ".join(faults[:5]) + more)


def shapes_at(graph: Graph, inputs: dict[str, Shape]) -> dict[str, Shape]:
    """The shape of every value for inputs of these shapes; ConfigError at the first node that they do not fit."""
    shapes = dict(inputs)
    for name, node, reads in graph.named_nodes():
        shapes[name] = node.output_shape(*(shapes[read] for read in reads))
    return shapes


def input_shapes(info: Info, length: int) -> dict[str, Shape]:
    """The shapes of the inputs, `length` where any length will do."""
    return {spec.name: tuple(length if size is None else size for size in spec.shape) for spec in info.inputs}


def lengths_to_check(info: Info) -> tuple[int, ...]:
    """The lengths of an input at which shapes are checked: the shortest and the longest."""
    return tuple(sorted({1, info.n_positions})) if info.any_length else (1,)


@rule
def number_of_nodes(graph: Graph, info: Info) -> Iterator[str]:
    """A graph has a node, and not too many."""
    if not 1 <= len(graph.nodes) <= MAX_NODES:
        yield f"{len(graph.nodes)} nodes, of at most {MAX_NODES}"


@rule
def known_operators(graph: Graph, info: Info) -> Iterator[str]:
    """Every node is of a registered kind."""
    for node in graph.nodes:
        if not isinstance(node, Node) or NODE_KINDS.get(node.op) is not type(node):
            yield f"{type(node).__name__} is no kind of node"


@rule
def names(graph: Graph, info: Info) -> Iterator[str]:
    """Names are short, of plain characters, and there once; each node knows its own."""
    seen: set[str] = set()
    for name in [*graph.input_names, *(node.name for node in graph.nodes)]:
        if not NAME.fullmatch(name):
            yield f"the name {name[:64]!r}"
        if name in seen:
            yield f"{name} is there twice"
        seen.add(name)
    for name, node, _ in graph.named_nodes():
        if node.name != name:
            yield f"{name} calls itself {node.name}"
        if node.layer and not NAME.fullmatch(node.layer):
            yield f"{name} is in the layer {node.layer[:64]!r}"


@rule
def inputs_come_before_their_readers(graph: Graph, info: Info) -> Iterator[str]:
    """What a node reads is an input or an earlier node."""
    known = set(graph.input_names)
    for name, _, reads in graph.named_nodes():
        for read in reads:
            if read not in known:
                yield f"{name} reads {read}, which is no input and no earlier node"
        known.add(name)


@rule
def number_of_inputs(graph: Graph, info: Info) -> Iterator[str]:
    """A node reads as many values as its operator takes."""
    for name, node, reads in graph.named_nodes():
        if len(reads) != node.arity if node.arity is not None else not reads:
            yield f"{name} ({node.op}) reads {len(reads)} values"


@rule
def one_output(graph: Graph, info: Info) -> Iterator[str]:
    """There is one output, and it is a node."""
    if len(graph.output_names) != 1:
        yield f"{len(graph.output_names)} outputs"
    elif graph.output_names[0] not in graph._graph:
        yield f"the output {graph.output_names[0]} is no node"


@rule
def every_node_is_needed(graph: Graph, info: Info) -> Iterator[str]:
    """The output depends on every node."""
    needed = set(graph.output_names)
    for name, _, reads in reversed(list(graph.named_nodes())):
        if name in needed:
            needed.update(reads)
        else:
            yield f"nobody reads {name}"


@rule
def declared_inputs(graph: Graph, info: Info) -> Iterator[str]:
    """The inputs are those that were declared, in order, with shapes that can be."""
    declared = [spec.name for spec in info.inputs]
    if declared != list(graph.input_names):
        yield f"the graph reads {graph.input_names}, declared are {declared}"
    for spec in info.inputs:
        if len(spec.shape) > MAX_RANK or any(size is not None and size < 1 for size in spec.shape):
            yield f"{spec.name} has shape {list(spec.shape)}"
        if None in spec.shape and info.n_positions < 1:
            yield f"{spec.name} has any length, but the model has no positions"


@rule
def token_ids_are_only_looked_up(graph: Graph, info: Info) -> Iterator[str]:
    """Token ids go into tables, and nothing else does."""
    ids = {spec.name for spec in info.inputs if spec.kind == "ids"}
    for name, node, reads in graph.named_nodes():
        if (reads[0] in ids) != node.reads_ids or any(read in ids for read in reads[1:]):
            yield f"{name} ({node.op}) reads {', '.join(reads)}"


@rule
def constants_are_finite(graph: Graph, info: Info) -> Iterator[str]:
    """No attribute of a node is infinite or no number."""
    for node in graph.nodes:
        for value in node.attributes().values():
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{node.name}: {value}"


@rule
def ranks_and_sizes(graph: Graph, info: Info) -> Iterator[str]:
    """Weights and lists of axes are of bounded size."""
    for node in graph.nodes:
        for key, shape in node.parameter_shapes.items():
            if len(shape) > MAX_RANK or any(size < 1 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
                yield f"{node.name}: {key} of shape {list(shape)[: MAX_RANK + 1]}"
        for value in node.attributes().values():
            if isinstance(value, list) and len(value) > MAX_RANK:
                yield f"{node.name}: {len(value)} axes"


@rule
def tied_weights(graph: Graph, info: Info) -> Iterator[str]:
    """A weight that is tied is the transpose of a table that is there."""
    for node in graph.nodes:
        if node.tied_to is not None:
            table = graph._modules.get(node.tied_to)
            if table is None or not table.reads_ids or table.parameter_shapes["weight"][::-1] != node.parameter_shapes["weight"]:
                yield f"{node.name} is tied to {node.tied_to}, which is no table of its size"


@rule
def shared_weights(graph: Graph, info: Info) -> Iterator[str]:
    """A weight that is an earlier node's is that of one that has it to itself, in the same shape."""
    before: dict[str, Any] = {}
    for node in graph.nodes:
        if node.shared_with is not None:
            owner = before.get(node.shared_with)
            own = owner is not None and type(owner) is type(node) and owner.shared_with is None
            if owner is None or not own or owner.parameter_shapes["weight"] != node.parameter_shapes["weight"]:
                yield f"{node.name} shares the weight of {node.shared_with}, which has none of its size before it"
        before[node.name] = node


@rule
def any_length_means_any_length(graph: Graph, info: Info) -> Iterator[str]:
    """A graph for prompts of any length has only nodes that are."""
    for node in graph.nodes if info.any_length else ():
        if not node.any_length:
            yield f"{node.name} ({node.op}) is made for one length"


@rule
def shapes_fit(graph: Graph, info: Info) -> Iterator[str]:
    """Every node takes the shapes that it reads, and the output has the declared one."""
    for length in lengths_to_check(info):
        try:
            shapes = shapes_at(graph, input_shapes(info, length))
        except ConfigError as error:
            yield str(error)
            return
        for name, shape in shapes.items():
            if len(shape) > MAX_RANK or math.prod(shape) > MAX_ELEMENTS:
                yield f"{name} has shape {list(shape)[: MAX_RANK + 1]}"
        output = shapes[graph.output_names[0]]
        if output != info.output:
            yield f"the output has shape {list(output)}, declared is {list(info.output)}"


@rule
def declared_sizes(graph: Graph, info: Info) -> Iterator[str]:
    """What nodes say of the context and the vocabulary is what is declared."""
    for node in graph.nodes if info.any_length else ():
        yield from node.misfits(info)
