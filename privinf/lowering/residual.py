"""Linear maps that follow each other along a residual stream, made to run side by side.

Each truncation between two of them is an exchange that the next one waits for. Where nothing but sums lies between, the second map reads
what the first one does: with s = x + a A, s + s B = x + (a A + s B) = x + (x | a) (B over A + A B), one product and one truncation.

And what reads the stream, the next layer's q, k and v or the head, need not wait for it: with s = x + (x | a) (B over A), s W is
x W + (x | a) (B W over A W), and the stream's own truncation goes beside. That weight is larger than W, by A W: for small models alone.
"""

from __future__ import annotations

from typing import Any

import torch

from privinf.graph.draft import Draft
from privinf.graph.node import Node
from privinf.ops.add import Add
from privinf.ops.joint_linear import JointLinear
from privinf.ops.linear import Linear

MOST_ADDED = 1 << 21  # elements of private weights, at most, that are worth the rounds: 16 MB of set-up at 64 bits


def join_residuals(draft: Draft) -> None:
    """Makes one map of x and a of every x + a A whose only readers are a map B and the sum of both.

    With A (m, n) and B (n, n) the joint one, (n + m, n), is as large as both.
    """
    for key in draft.order():
        if key not in draft.nodes or type(draft.nodes[key]) is not Add:
            continue
        first, second = _branch(draft, key)
        if first is None or second is None:
            continue
        total = draft.reads[key][0] if draft.reads[key][1] == second else draft.reads[key][1]
        (source,) = draft.reads[first]
        kept = draft.reads[total][0] if draft.reads[total][1] == first else draft.reads[total][1]
        if kept == first or draft.shapes[kept][:-1] != draft.shapes[source][:-1]:
            continue
        joint = draft.add(_joined(draft.nodes[first], draft.nodes[second]), [kept, source])
        node = draft.nodes[key]
        draft.replace(key, type(node)(node.name, node.layer), [kept, joint])
        for left in (second, total, first):
            draft.drop(left)


def _branch(draft: Draft, key: str) -> tuple[str | None, str | None]:
    """Of a sum s + s B with s = x + a A: the keys of a A and of s B."""
    for second, total in (draft.reads[key], draft.reads[key][::-1]):
        if not _is_map(draft, second) or draft.reads[second] != [total] or draft.single_reader(second) != key:
            continue
        if type(draft.producer(total)) is not Add or total == draft.output or set(draft.readers(total)) != {key, second}:
            continue
        if draft.shapes[total] != draft.shapes[key]:
            continue
        for first in draft.reads[total]:
            if _is_map(draft, first) and draft.single_reader(first) == total and draft.shapes[first] == draft.shapes[total]:
                return first, second
    return None, None


def _is_map(draft: Draft, key: str) -> bool:
    return type(draft.producer(key)) is Linear


def _joined(first: Any, second: Any) -> JointLinear:
    """(x | a) -> a A + (x + a A) B, with the biases of both."""
    a, b = (node.value("weight").double() for node in (first, second))
    values = {"weight": torch.cat([b, a + a @ b])}
    offset, other = first.maybe("bias"), second.maybe("bias")
    if offset is not None or other is not None:
        bias = torch.zeros(b.shape[1], dtype=torch.float64)
        if offset is not None:
            bias = bias + offset.double() + offset.double() @ b
        values["bias"] = bias if other is None else bias + other.double()
    return JointLinear(second.name, second.layer, **values)


def join_readers(draft: Draft) -> None:
    """Lets every map of a sum x + (x | a) M read x and a instead, if what that adds to all weights together is little.

    The order is that of the messages: what reads the sum goes before the sum's own map, whose truncation nobody waits for then.
    """
    needed = dict.fromkeys(draft.order())
    found = [(key, *parts) for key in needed if (parts := _sum_of_a_map(draft, key)) is not None]
    joined = [(reader, *rest) for key, *rest in found for reader in draft.readers(key) if reader in needed and _may_join(draft, reader)]
    added = sum(draft.shapes[a][-1] * draft.shapes[reader][-1] for reader, _, _, a in joined)
    for reader, x, first, a in joined if added <= MOST_ADDED else ():
        node = _reads_parts(draft.nodes[reader], draft.nodes[first], draft.shapes[x][-1])
        draft.earlier.setdefault(first, []).append(draft.replace(reader, node, [x, a]))


def _sum_of_a_map(draft: Draft, key: str) -> tuple[str, str, str] | None:
    """Of a sum x + (x | a) M, or x + a M: the keys of x, of the map, and of a."""
    if type(draft.nodes[key]) is not Add:
        return None
    for first, x in (draft.reads[key], draft.reads[key][::-1]):
        if isinstance(draft.producer(first), Linear) and draft.single_reader(first) == key and draft.shapes[x] == draft.shapes[key]:
            *others, a = draft.reads[first]
            if others in ([], [x]) and a != x and draft.shapes[a][:-1] == draft.shapes[x][:-1]:
                return x, first, a
    return None


def _may_join(draft: Draft, reader: str) -> bool:
    """A map that reads one value and is no table."""
    return _is_map(draft, reader) and not is_table(draft, draft.nodes[reader])


def is_table(draft: Draft, node: Node) -> bool:
    """Whether a matrix is an embedding's table, transposed: it stays as it is, to be encoded and masked once for both."""
    weight = node.value("weight").t()
    tables = [other.value("weight") for other in draft.nodes.values() if other.reads_ids]
    return any(table.shape == weight.shape and torch.equal(table, weight) for table in tables)


def _reads_parts(last: Any, first: Any, width: int) -> JointLinear:
    """(x | a) -> (x + (x | a) M) W, or of x + a M, with the biases of both."""
    m, w = (node.value("weight").double() for node in (first, last))
    both = m @ w
    weight = torch.cat([w, both]) if first.arity == 1 else torch.cat([w + both[:width], both[width:]])
    values = {"weight": weight}
    offset, other = first.maybe("bias"), last.maybe("bias")
    if offset is not None or other is not None:
        bias = torch.zeros(w.shape[1], dtype=torch.float64) if offset is None else offset.double() @ w
        values["bias"] = bias if other is None else bias + other.double()
    return JointLinear(last.name, last.layer, **values)
