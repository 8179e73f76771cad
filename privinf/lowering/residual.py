"""Linear maps that follow each other along a residual stream, made to run side by side.

Each truncation between two of them is an exchange that the next one waits for. Where nothing but sums lies between, the second map reads
what the first one does: with s = x + a A, s + s B = x + (a A + s B) = x + (x | a) (B over A + A B), one product and one truncation.
"""

from __future__ import annotations

from typing import Any

import torch

from privinf.graph.draft import Draft
from privinf.ops.add import Add
from privinf.ops.joint_linear import JointLinear
from privinf.ops.linear import Linear


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
