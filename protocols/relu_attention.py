"""Attention whose weights are ReLU of the scores over the number of visible keys: no maximum, no exponential, no reciprocal.

Source: Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", arXiv 2309.08586.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from protocols.activation import cost_relu, relu
from protocols.declared import Declared
from protocols.memo import constant
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, cost_scores, cost_weighted, scores, weighted
from protocols.ring import like
from protocols.rows import Rows
from protocols.sequences import Stack, scores_of_sequences, weighted_of_sequences
from protocols.shares import Shares, Wire
from protocols.truncation import cost_rescale, rescale

FRAC = 12  # of the scores, and of the weights
INVERSE_FRAC = 22  # of 1 / length: right to 2^-13 of the value at 1024


@dataclass(frozen=True, slots=True)
class ReluRings:
    """The rings of one attention region; the ring plan sets them."""

    qk_bits: int = 33  # q and k, and their product
    q_frac: int = 12
    k_frac: int = 12
    score_bits: int = 21  # of the scores, where they are compared with 0
    v_bits: int = 44  # the weights and v, and their product
    v_frac: int = 12
    sum_frac: int = 13  # of the sums of v
    mean_bits: int = 56  # those over the length, with `INVERSE_FRAC` fraction bits more
    out_bits: int = 33  # the result
    out_frac: int = 13


@dataclass(frozen=True, eq=False, slots=True)
class LiveMean:
    """Of a row that is filled up, or one of each sequence: what of it counts, (N,) of 0 and 1, and `inverses` of its length, (rows, 1)."""

    mask: Tensor
    inverse: Tensor


def inverses(lengths: Tensor) -> Tensor:
    """1 / length in `INVERSE_FRAC` fraction bits, int64."""
    return ((1 << INVERSE_FRAC + 1) + lengths) // (2 * lengths)


@constant()
def _of_rows(rows: Rows) -> Tensor:
    """(number, 1)"""
    return inverses(torch.from_numpy(rows.lengths.copy()).long())[:, None]


def relu_attention(
    party: Party,
    q: Wire,
    keys: Cached | Stack,
    values: Cached | Stack | Protocol_[Cached | Stack],
    rows: Rows,
    rings: ReluRings,
    *,
    live: LiveMean | None = None,
) -> Protocol_[Shares]:
    """relu(q k^T) v, each row over its length, on masked wires: q (H, n, d), keys and values (H, m, d) -> (H, n, d), in Z_2^out_bits.

    Heads that share keys and values, and several sequences, as in `softmax.attention`. Of a row that is filled up those elements that are
    not `live` get weight 0, and its length is the real one.
    Steps: the scores, truncate-reduced; `relu`, into the ring of v; weights and values are opened, their product is local; it is rescaled
    by one exchange, times the public 1 / length, and reduced.
    Domain: scores below 2^(score_bits - 14); sums of v below 2^(v_bits - 14 - v_frac), results below
    2^(mean_bits - 24 - sum_frac). Error, for |v| <= V: 2^-12 V by the roundings of
    the scores, 2^-13 of the value, and 2^-sum_frac.
    Rounds: those of `relu`, 1, 1. Bits: those of `relu`, and per element v_bits each way. Learns: uniform values, both.
    """
    lead = q.shape[:-2]

    def weights() -> Protocol_[Shares]:
        score = (scores_of_sequences if isinstance(keys, Stack) else scores)(party, q, keys, rows, rings.qk_bits)  # type: ignore[arg-type]
        score = yield from rescale(party, score.map(lambda x: x.flatten(0, -2)), bits=rings.score_bits, frac=FRAC)
        p = yield from relu(party, score, compare_bits=rings.score_bits, bits=rings.v_bits)
        return p if live is None else p.times(live.mask)

    p, v = (yield from parallel(weights(), values)) if isinstance(values, Generator) else ((yield from weights()), values)
    (wire,) = yield from open_masked(party, [p.map(lambda x: x.reshape(*lead, -1))])
    z = (weighted_of_sequences if isinstance(v, Stack) else weighted)(party, wire, v, rows, rings.v_bits)  # type: ignore[arg-type]
    z = z.map(lambda x: x.reshape(p.shape[0], rows.number, -1))
    z = yield from rescale(party, z, bits=rings.mean_bits, frac=rings.sum_frac)
    mean = z.times(like(_of_rows(rows), z.value) if live is None else live.inverse, INVERSE_FRAC)
    return (yield from rescale(party, mean, bits=rings.out_bits, frac=rings.out_frac))


def cost_relu_attention(heads: int, width: int, rows: Rows, rings: ReluRings) -> Declared:
    """From opened q, k and v to the means."""
    count, outputs = heads * rows.count, heads * rows.number * width
    return (
        cost_scores(heads, rows, rings.qk_bits)
        + cost_rescale(count, rings.qk_bits, rings.q_frac + rings.k_frac - FRAC, rings.score_bits)
        + cost_relu(count, rings.score_bits, rings.v_bits)
        + cost_open_masked((count, rings.v_bits))
        + cost_weighted(heads, rows, width, rings.v_bits)
        + cost_rescale(outputs, rings.v_bits, FRAC + rings.v_frac - rings.sum_frac, rings.mean_bits)
        + cost_rescale(outputs, rings.mean_bits, rings.sum_frac + INVERSE_FRAC - rings.out_frac, rings.out_bits)
    )


@torch.library.custom_op("privinf::relu_attention", mutates_args=())
def attend(qkv: Tensor, heads: int) -> Tensor:
    """q, k, v side by side (B, T, 3 d) -> heads merged (B, T, d), causal: one operator, so that an exporter keeps it whole."""
    batch, count, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, d_k)
    y: Tensor = mean_weights(q @ k.mT) @ v
    return y.transpose(1, 2).reshape(batch, count, width).contiguous()


@attend.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def mean_weights(scores: Tensor) -> Tensor:
    """Causal scores (..., T, T) -> relu of them over the number of visible keys, 0 for the others; floats."""
    size = scores.shape[-1]
    length = torch.arange(1, size + 1, dtype=scores.dtype, device=scores.device)[:, None]
    return scores.relu().tril() / length
