"""Every kind of correlation, asked for by protocols on shapes; `n` is a size."""

from __future__ import annotations

import functools
from typing import Any

import torch

from protocols.activation import gelu, softplus
from protocols.ceiling import row_ceiling
from protocols.correlations import Kind, Role
from protocols.linear import Weight, linear, scale
from protocols.maximum import row_argmax
from protocols.norm import layer_norm
from protocols.opening import open_masked
from protocols.party import Party, Trace
from protocols.product import Cached, matmul_wires
from protocols.ring import blank
from protocols.rowrange import RowRange
from protocols.rows import Rows, Stacked
from protocols.sequences import gather, put
from protocols.shares import Shares
from protocols.softmax import AttentionRings, attention


def weights(n: int) -> dict[str, Weight]:
    return {"w": Weight("w", (2 * n, 3 * n), 44, 8), "s": Weight("s", (2, n), 44, 8)}


def everything(party: Party, n: int) -> None:
    """Protocols that ask for all kinds, on shapes."""

    def shares(*shape: int, bits: int = 44) -> Shares:
        return Shares(blank(*shape), bits, 12)

    def pass_() -> Any:
        rows, rings = Rows(1, n, 1), AttentionRings()
        q, k = yield from open_masked(party, [shares(2, n, 4, bits=33), shares(2, n, 4, bits=33)], keep=True)
        (v,) = yield from open_masked(party, [shares(2, n, 4)])
        yield from attention(party, q, Cached.join(None, k), Cached.join(None, v), rows, rings)
        (w,) = yield from open_masked(party, [shares(2, n, 4, bits=46)])
        within = AttentionRings(v_bits=46, within=RowRange(6, 10, 6, True))
        yield from attention(party, q, Cached.join(None, k), Cached.join(None, w), rows, within)
        yield from attention(party, q, Cached.join(None, k), Cached.join(None, v), rows, AttentionRings(q_frac=14, score_fine=2))
        a, b = (gather(party, None, wire, [(1, 0, 2), (1, 1, n - 1)], (0, 1)) for wire in (k, v))
        (r,) = yield from open_masked(party, [shares(2, 2, 4, bits=33)])
        a = put(party, ("", ""), a, r, (1, n), (0, 1))
        yield from attention(party, q, a, b, Stacked.of([Rows(n, 1, 1), Rows(1, n - 1, 1)]), rings)
        (z,) = yield from open_masked(party, [shares(1, n, bits=21)])
        yield from row_ceiling(party, z, Rows(n, 1, 0), 12)
        matmul_wires(party, q, Cached(v.masked.mT, v.mask.mT, (q.name,), 33, 12), 33) if n == 4 else None
        yield from linear(party, shares(3, 2 * n), weights(n)["w"], bits=40)
        yield from linear(party, shares(3, 3 * n), weights(n)["w"], bits=40, transposed=True)
        yield from scale(party, shares(2, 3, 5), weights(n)["s"], bits=40, window=(0, 2, 1, 2))
        yield from gelu(party, shares(3, n), "tanh", compare_bits=20, bits=40)
        yield from softplus(party, shares(3, n), compare_bits=20, bits=40)
        yield from layer_norm(party, shares(3, n), epsilon=1e-5, size_bits=20, bits=40)
        (logits,) = yield from open_masked(party, [shares(1, 33 * n, bits=24)])
        yield from row_argmax(party, logits, Rows(33 * n, 1, 0))

    party.run(pass_())


@functools.cache
def asked(n: int) -> tuple[Kind, ...]:
    trace = Trace(Role.SERVER, costs=False)
    everything(Party(Role.SERVER, trace), n)
    return tuple(trace.kinds)


def masks(n: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(weight.shape, dtype=torch.int64) for name, weight in weights(n).items()}
