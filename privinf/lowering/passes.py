"""Rewriting passes over a draft: what can only be seen once the whole graph is there.

No pass decides by the value of a weight: the client sees the structure, which must not depend on the weights. (A causal mask is
structure, and is compared by value; a head that equals an embedding's table is tied to it.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import RECOGNISERS
from privinf.graph.draft import Draft, joint_name
from privinf.graph.node import Node
from privinf.lowering.residual import is_table, join_readers, join_residuals
from privinf.ops.last_position import LastPosition
from privinf.ops.linear import Linear
from privinf.ops.mul_constant import MulConstant
from privinf.ops.permute import Permute
from privinf.ops.reshape import Reshape
from privinf.ops.slice import LAST, Slice


def run_passes(draft: Draft, last_position: bool = False, *, alike: bool = False) -> None:
    """Everything between the table and the finished graph; `alike`: see `lower_graph`."""
    if last_position:
        node = draft.producer(draft.output)
        draft.output = draft.add(LastPosition("last_position", node.layer if node else ""), [draft.output])
    draft.prune()
    for folded in (False, True):
        for recognise in RECOGNISERS[folded]:
            recognise(draft)
        fold_linear(draft)
    sink_reshapes(draft)
    tidy_layout(draft)
    name_last_axes(draft, last_position)
    sink_last_position(draft)
    fuse_siblings(draft)
    name_last_axes(draft, last_position)
    tidy_layout(draft)
    join_residuals(draft)
    if not alike:  # the first layer has no map before it that it could be joined with
        join_readers(draft)
    draft.prune()


# ---- linear maps


def fold_linear(draft: Draft) -> None:
    """Constants and neighbouring linear maps go into the private weights, until nothing changes."""
    changed = True
    while changed:
        folded = [fold_at(draft, key) for key in draft.order() if key in draft.nodes]
        changed = any(folded)
        draft.prune()


def fold_at(draft: Draft, key: str) -> bool:
    """Folds the node `key` and what it reads into one linear map, where one is a linear map; whether it did."""
    node = draft.nodes[key]
    source = draft.reads[key][0]
    before = draft.producer(source)
    width = draft.shapes[source][-1] if draft.shapes[source] else 1
    if isinstance(before, Linear) and draft.single_reader(source) == key:
        after = node.affine(width)
        if after is not None and draft.shapes[key] == draft.shapes[source]:
            weight, bias = doubles(before)
            factor, term = after
            bias = None if bias is None else bias * factor
            bias = term if bias is None else bias if term is None else bias + term
            return put_linear(draft, key, before, source, weight * factor, bias)
        if isinstance(node, Linear):
            rows, middle = before.parameter_shapes["weight"]
            columns = node.parameter_shapes["weight"][1]
            if rows * columns <= rows * middle + middle * columns:
                (first, first_bias), (second, bias) = doubles(before), doubles(node)
                return put_linear(draft, key, node, source, first @ second, join(bias, first_bias, second))
    if isinstance(node, Linear) and not isinstance(before, Linear) and not is_table(draft, node):
        affine = None if before is None else before.affine(width)
        if affine is not None and draft.shapes[draft.reads[source][0]] == draft.shapes[source]:
            weight, bias = doubles(node)
            return put_linear(draft, key, node, source, affine[0][:, None] * weight, join(bias, affine[1], weight))
    if isinstance(node, MulConstant) and isinstance(before, MulConstant):
        merged = MulConstant(node.name, node.layer, constant=node.constant * before.constant)
        draft.replace(key, merged, [draft.reads[source][0]])
        return True
    return False


def doubles(node: Node) -> tuple[Tensor, Tensor | None]:
    """A linear map's weight and bias in float64."""
    bias = node.maybe("bias")
    return node.value("weight").double(), None if bias is None else bias.double()


def join(bias: Tensor | None, earlier: Tensor | None, weight: Tensor) -> Tensor | None:
    """The bias of (x + earlier) W + bias."""
    if earlier is None:
        return bias
    moved = earlier @ weight
    return moved if bias is None else bias + moved


def put_linear(draft: Draft, key: str, named: Node, source: str, weight: Tensor, bias: Tensor | None) -> bool:
    """Replace `key` by a linear map that reads what `source` reads."""
    values: dict[str, Any] = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    draft.replace(key, Linear(named.name, named.layer, **values), [draft.reads[source][0]])
    return True


def fuse_siblings(draft: Draft) -> None:
    """Linear maps of one value become one: its opening is paid once."""
    for source in [*draft.inputs, *draft.order()]:
        if source not in draft.shapes:
            continue  # replaced on the way
        siblings = [reader for reader in draft.readers(source) if isinstance(draft.nodes[reader], Linear)]
        if len(siblings) < 2:
            continue
        nodes = [draft.nodes[sibling] for sibling in siblings]
        weights = torch.cat([node.value("weight") for node in nodes], dim=1)
        values = {"weight": weights}
        if any("bias" in node.parameter_shapes for node in nodes):
            empty = [torch.zeros(node.parameter_shapes["weight"][1]) for node in nodes]
            biases = [node.maybe("bias") for node in nodes]
            values["bias"] = torch.cat([other if bias is None else bias for bias, other in zip(biases, empty, strict=True)])
        fused = draft.add(Linear(joint_name([node.name for node in nodes]), nodes[0].layer, **values), [source])
        axis, start = len(draft.shapes[fused]) - 1, 0
        for sibling, node in zip(siblings, nodes, strict=True):
            stop = start + node.parameter_shapes["weight"][1]
            piece = Slice(node.name.removesuffix(".linear") + ".slice", node.layer, dim=axis, start=start, stop=stop)
            draft.replace(sibling, piece, [fused])
            start = stop


# ---- positions


def name_last_axes(draft: Draft, any_length: bool) -> None:
    """In a graph for any length a slice of the last axis says so, and not by its number: it then treats rows alike."""
    for key in draft.order() if any_length else ():
        node = draft.nodes[key]
        if isinstance(node, Slice) and node.dim == len(draft.shapes[key]) - 1:
            draft.replace(key, Slice(node.name, node.layer, **node.attributes() | {"dim": LAST}), draft.reads[key])


def sink_last_position(draft: Draft) -> None:
    """Take the last position as early as possible: what treats rows alike then runs for one row."""
    changed = True
    while changed:
        changed = False
        for key in draft.order():
            if key not in draft.nodes or not isinstance(draft.nodes[key], LastPosition):
                continue
            source = draft.reads[key][0]
            twins = [reader for reader in draft.readers(source) if isinstance(draft.nodes[reader], LastPosition)]
            for twin in twins[1:]:
                draft.swap(twin, twins[0])
                draft.drop(twin)
                changed = True
            node = draft.producer(source)
            if key not in draft.nodes or node is None or draft.single_reader(source) != key:
                continue
            narrowed = node.last_position_of()
            if narrowed is not None:
                draft.replace(source, narrowed, draft.reads[source])
                changed = True
                continue
            if not treats_rows_alike(draft, source):
                continue
            name = f"{node.layer}.last_position" if node.layer else "last_position"
            reads = [draft.add(LastPosition(name, node.layer), [read]) for read in draft.reads[source]]
            draft.swap(key, draft.add(node, reads))
            draft.drop(key)
            draft.drop(source)
            changed = True


def treats_rows_alike(draft: Draft, key: str) -> bool:
    """Whether a node computes every row by itself, so that it may run on rows of any number."""
    node, shape = draft.nodes[key], draft.shapes[key]
    if any(draft.shapes[read][:-1] != shape[:-1] for read in draft.reads[key]) or len(shape) < 3:
        return False
    return bool(node.rowwise)


# ---- layout


def sink_reshapes(draft: Draft) -> None:
    """Reshape after a linear map rather than before it, where the rows stay: pairs of reshapes around it then cancel."""
    for key in draft.order():
        node = draft.nodes[key]
        if not isinstance(node, Linear):
            continue
        before = draft.reads[key][0]
        if not isinstance(draft.producer(before), Reshape):
            continue
        source = draft.reads[before][0]
        if draft.shapes[source][-1:] == draft.shapes[before][-1:]:
            inner = draft.add(node, [source])
            name = node.name.removesuffix(".linear") + ".reshape"
            draft.swap(key, draft.add(Reshape(name, node.layer, shape=list(draft.shapes[key])), [inner]))
            draft.drop(key)
    draft.prune()


def tidy_layout(draft: Draft) -> None:
    """Reshapes of reshapes and permutations of permutations are one; those that change nothing go."""
    for key in draft.order():
        node = draft.nodes[key]
        if not isinstance(node, Reshape | Permute):
            continue
        source = draft.reads[key][0]
        dims = node.dims if isinstance(node, Permute) else []
        while type(before := draft.producer(source)) is type(node):
            dims = [before.dims[dim] for dim in dims] if isinstance(before, Permute) else dims
            source = draft.reads[source][0]
        if draft.shapes[source] == draft.shapes[key] and dims == sorted(dims) and (key != draft.output or source in draft.nodes):
            draft.swap(key, source)
            draft.drop(key)
        elif source != draft.reads[key][0]:
            values: dict[str, Any] = {"dims": dims} if dims else {"shape": list(draft.shapes[key])}
            draft.replace(key, type(node)(node.name, node.layer, **values), [source])
