"""`PrivinfTensor`: the CrypTensor on which a lowered graph runs on our protocols, at one party.

A node hands itself to the tensor's method of its kind; the method runs the protocol that the node's plan asks for. The
same code walks the graph on shapes alone before the query (`protocols.party`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import CrypTensor, Graph, PrivateValue
from privinf.lowering.plan import COMPARED_FRAC, weights_of
from protocols.activation import gelu, relu
from protocols.linear import Weight, linear, lookup, scale
from protocols.norm import layer_norm
from protocols.opening import add_server_constant, open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, matmul_wires, multiply
from protocols.ring import encode
from protocols.rows import Rows
from protocols.shares import Shares, Wire
from protocols.softmax import AttentionRings, attention, softmax
from protocols.truncation import rescale

Cache = dict[str, tuple[Cached, Cached]]


@dataclass
class Runtime:
    """One party's walk over a graph: the party, the public records of its weights, the cached keys and values so far."""

    party: Party
    weights: dict[str, Weight]
    cache: Cache = field(default_factory=dict)
    offset: int = 0  # positions in the cache
    constants: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)  # S's encoded biases and positions
    device: torch.device | str = "cpu"  # where this party computes
    unread: frozenset[str] = frozenset()  # attention whose result nothing reads in this pass: it takes in keys and values alone

    @staticmethod
    def of(graph: Graph, party: Party, device: torch.device | str = "cpu") -> Runtime:
        """A walk with an empty cache."""
        return Runtime(party, {name: record for name, (record, _, _) in weights_of(graph).items()}, device=device)

    def sketch(self, party: Party) -> Runtime:
        """A walk on shapes from the same state; what it does to the cache is forgotten."""
        shapes = {n: (k.shape_only(), v.shape_only()) for n, (k, v) in self.cache.items()}
        return Runtime(party, self.weights, shapes, self.offset, self.constants, self.device)


def label_of(node: Any) -> tuple[str, str]:
    """(layer, operator within it), what bytes and seconds are attributed to."""
    return node.layer, node.name.removeprefix(f"{node.layer}.") if node.layer else node.name


@CrypTensor.register_cryptensor("privinf")
class PrivinfTensor(PrivateValue):
    """Shares of a tensor at one party, or the ids that only the client knows (`ids`: (1, T), a meta tensor elsewhere)."""

    def __init__(self, runtime: Runtime, shares: Shares | None = None, ids: Tensor | None = None) -> None:
        super().__init__()
        self.runtime = runtime
        self.held = shares
        self.ids = ids

    def __repr__(self) -> str:
        return f"PrivinfTensor({self.held if self.held is not None else 'ids hidden'})"

    @property
    def shares(self) -> Shares:
        """This party's shares."""
        assert self.held is not None
        return self.held

    @property
    def party(self) -> Party:
        """Who walks."""
        return self.runtime.party

    def _as(self, shares: Shares) -> PrivinfTensor:
        return PrivinfTensor(self.runtime, shares)

    def _run(self, node: Any, protocol: Protocol_[Shares]) -> PrivinfTensor:
        with self.party.label(*label_of(node)):
            return self._as(self.party.run(protocol))

    def _moved(self, function: Callable[[Tensor], Tensor]) -> PrivinfTensor:
        return self._as(self.shares.map(function))

    def _constant(self, node: Any, key: str, frac: int) -> Tensor | None:
        """S's encoded tensor; None at C."""
        if not self.party.is_server or key not in node.parameter_shapes:
            return None
        found = self.runtime.constants.get((node.name, key, frac))
        if found is None:
            found = self.runtime.constants[node.name, key, frac] = encode(node.value(key).to(self.runtime.device), frac)
        return found

    def _canonical(self, node: Any, x: Shares) -> Protocol_[Shares]:
        bits, frac = node.plan["bits"], node.plan["frac"]
        return (yield from rescale(self.party, x, bits=bits, frac=frac)) if (x.bits, x.frac) != (bits, frac) else x

    # ---- maps with the server's weights

    def op_embedding(self, node: Any) -> PrivinfTensor:
        assert self.ids is not None
        weight, ids, ring = self.runtime.weights[f"{node.name}.weight"], self.ids, node.plan["ring"]

        def protocol() -> Protocol_[Shares]:
            x = yield from lookup(self.party, ids.reshape(-1), ids.numel(), weight, bits=ring)
            x = x.map(lambda v: v.reshape(*ids.shape, -1))  # (B, T, d)
            return (yield from self._canonical(node, x))

        return self._run(node, protocol())

    def op_position_bias(self, node: Any) -> PrivinfTensor:
        offset, count = self.runtime.offset, self.shares.shape[1]
        rows = self._constant(node, "weight", self.shares.frac)
        return self._as(add_server_constant(self.party, self.shares, None if rows is None else rows[offset : offset + count]))

    def op_linear(self, node: Any) -> PrivinfTensor:
        plan, tied = node.plan, node.tied_to
        weight = self.runtime.weights[f"{tied or node.name}.weight"]
        in_frac = plan.get("in_frac", self.shares.frac)
        bias = self._constant(node, "bias", in_frac + weight.frac)

        def protocol() -> Protocol_[Shares]:
            x = yield from rescale(self.party, self.shares, bits=plan["ring"], frac=in_frac)
            y = yield from linear(self.party, x, weight, bits=plan["ring"], transposed=bool(tied))
            y = add_server_constant(self.party, y, bias)
            if plan.get("raw"):
                return y
            if "out_bits" in plan:
                return (yield from rescale(self.party, y, bits=plan["out_bits"], frac=plan["out_frac"]))
            return (yield from self._canonical(node, y))

        return self._run(node, protocol())

    def op_scale(self, node: Any) -> PrivinfTensor:
        weight = self.runtime.weights[f"{node.name}.weight"]

        def protocol() -> Protocol_[Shares]:
            y = yield from scale(self.party, self.shares.narrow(node.plan["ring"]), weight, bits=node.plan["ring"])
            return (yield from self._canonical(node, y))

        return self._run(node, protocol())

    def op_bias(self, node: Any) -> PrivinfTensor:
        return self._as(add_server_constant(self.party, self.shares, self._constant(node, "weight", self.shares.frac)))

    # ---- attention and softmax

    def op_attention(self, node: Any) -> PrivinfTensor:
        plan, x = node.plan, self.shares
        batch, count, _ = x.shape
        heads, width, offset = node.heads, node.head_dim, self.runtime.offset
        asked = 1 if node.last_query else count
        rings = AttentionRings(**{name: plan[name] for name in AttentionRings.__dataclass_fields__})

        def part(index: int) -> Shares:
            # (B, T, 3 d) -> (B H, T, d_k)
            return x.map(
                lambda v: v.reshape(batch, count, 3, heads, width)[:, :, index].transpose(1, 2).reshape(batch * heads, count, width)
            )

        def query() -> Protocol_[Shares]:
            q = part(0).map(lambda v: v[:, count - asked :])
            if "inverse_temperature" in node.parameter_shapes:
                weight = self.runtime.weights[f"{node.name}.inverse_temperature"]
                apart = q.map(lambda v: v.reshape(batch, heads, asked, width))
                q = yield from scale(self.party, apart, weight, bits=x.bits, window=(offset + count - asked, offset + count))
                q = q.map(lambda v: v.reshape(batch * heads, asked, width))
            return (yield from rescale(self.party, q, bits=rings.qk_bits, frac=rings.q_frac))

        def protocol() -> Protocol_[Shares]:
            queries = [] if node.name in self.runtime.unread else [(yield from query())]
            k = yield from rescale(self.party, part(1), bits=rings.qk_bits, frac=rings.k_frac)
            v = yield from rescale(self.party, part(2), bits=rings.v_bits, frac=rings.v_frac)
            opened, (k_wire, v_wire) = yield from parallel(open_masked(self.party, queries), open_masked(self.party, [k, v], keep=True))
            old_k, old_v = self.runtime.cache.get(node.name, (None, None))
            keys, values = Cached.join(old_k, k_wire), Cached.join(old_v, v_wire)
            self.runtime.cache[node.name] = (keys, values)
            if not opened:
                return x
            out = yield from attention(self.party, opened[0], keys, values, Rows(offset + count - asked + 1, asked, 1), rings)
            # (B H, T, d_k) -> (B, T, d)
            return out.map(lambda v: v.reshape(batch, heads, asked, width).transpose(1, 2).reshape(batch, asked, heads * width))

        return self._run(node, protocol())

    def op_softmax(self, node: Any) -> PrivinfTensor:
        x = self.shares
        *_, number, length = x.shape if len(x.shape) > 1 else (1, *x.shape)
        rows = Rows(1, number, 1) if node.causal else Rows(length, number, 0)

        def protocol() -> Protocol_[Shares]:
            packed = x.map(lambda v: rows.pack(v.reshape(-1, number, length)))
            p = yield from softmax(self.party, packed, rows, bits=node.plan["bits"], frac=node.plan["frac"])
            return p.map(lambda v: rows.unpack(v).reshape(x.shape))

        return self._run(node, protocol())

    def op_relu(self, node: Any) -> PrivinfTensor:
        return self._compared(node, lambda x, bits: relu(self.party, x, compare_bits=node.plan["compare_bits"], bits=bits))

    def op_gelu(self, node: Any) -> PrivinfTensor:
        return self._compared(node, lambda x, bits: gelu(self.party, x, node.form, compare_bits=node.plan["compare_bits"], bits=bits))

    def _compared(self, node: Any, function: Callable[[Shares, int], Protocol_[Shares]]) -> PrivinfTensor:
        plan = node.plan

        def protocol() -> Protocol_[Shares]:
            x = yield from rescale(self.party, self.shares, bits=plan["opened"], frac=COMPARED_FRAC)
            y = yield from function(x, plan["out_bits"] + COMPARED_FRAC - plan["out_frac"])
            return (yield from rescale(self.party, y, bits=plan["out_bits"], frac=plan["out_frac"]))

        return self._run(node, protocol())

    def op_layer_norm(self, node: Any) -> PrivinfTensor:
        x, plan = self.shares, node.plan
        rows = x.map(lambda v: v.reshape(-1, v.shape[-1]))

        def protocol() -> Protocol_[Shares]:
            y = yield from layer_norm(self.party, rows, epsilon=node.epsilon, size_bits=plan["size_bits"], bits=plan["bits"])
            return y.map(lambda v: v.reshape(x.shape))

        return self._run(node, protocol())

    # ---- products of two private values

    def _opened(self, node: Any, other: PrivinfTensor) -> Protocol_[list[Wire]]:
        ring = node.plan["ring"]
        values = [self.shares.narrow(ring)] if other is self else [self.shares.narrow(ring), other.shares.narrow(ring)]
        wires = yield from open_masked(self.party, values)
        return [wires[0], wires[-1]]

    def op_matmul(self, node: Any, other: PrivinfTensor) -> PrivinfTensor:
        def protocol() -> Protocol_[Shares]:
            x, y = yield from self._opened(node, other)
            z = matmul_wires(self.party, x, Cached.join(None, y), node.plan["ring"])
            return (yield from self._canonical(node, z))

        return self._run(node, protocol())

    def op_mul(self, node: Any, other: PrivinfTensor) -> PrivinfTensor:
        def protocol() -> Protocol_[Shares]:
            x, y = yield from self._opened(node, other)
            return (yield from self._canonical(node, multiply(self.party, x, y, node.plan["ring"])))

        return self._run(node, protocol())

    # ---- local

    def op_add(self, node: Any, other: PrivinfTensor) -> PrivinfTensor:
        return self._as(self.shares + other.shares)

    def op_sub(self, node: Any, other: PrivinfTensor) -> PrivinfTensor:
        return self._as(self.shares - other.shares)

    def op_mul_constant(self, node: Any) -> PrivinfTensor:
        frac = node.plan["frac"]
        integer = round(node.constant * 2.0**frac)

        def protocol() -> Protocol_[Shares]:
            return (yield from self._canonical(node, self.shares.narrow(node.plan["ring"]).times(integer, frac)))

        return self._run(node, protocol())

    def op_add_constant(self, node: Any) -> PrivinfTensor:
        constant = torch.tensor(round(node.constant * 2.0**self.shares.frac)) if self.party.is_server else None
        return self._as(add_server_constant(self.party, self.shares, constant))

    def op_reshape(self, node: Any) -> PrivinfTensor:
        return self._moved(lambda v: v.reshape(node.shape))

    def op_permute(self, node: Any) -> PrivinfTensor:
        return self._moved(lambda v: v.permute(node.dims))

    def op_slice(self, node: Any) -> PrivinfTensor:
        return self._moved(lambda v: v[(slice(None),) * node.dim + (slice(node.start, node.stop, node.step),)])

    def op_select(self, node: Any) -> PrivinfTensor:
        return self._moved(lambda v: v[(slice(None),) * node.dim + (node.index,)])

    def op_cat(self, node: Any, *others: PrivinfTensor) -> PrivinfTensor:
        parts = [self.shares, *(other.shares for other in others)]
        known = all(not p.value.is_meta for p in parts)
        value = torch.cat([p.value if known else p.value.to("meta") for p in parts], node.dim)
        early = all(p.early for p in parts)
        return self._as(replace(self.shares, value=value, bits=min(p.bits for p in parts), early=early))

    def op_last_position(self, node: Any) -> PrivinfTensor:
        return self._moved(lambda v: v[:, -1])


def encode_weights(graph: Graph, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """S's encoded weights by name, int64, on a device."""
    return {name: encode(node.value(key).to(device), record.frac) for name, (record, node, key) in weights_of(graph).items()}


__all__ = ["Cache", "PrivinfTensor", "Runtime", "encode_weights"]
