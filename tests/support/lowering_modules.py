"""Modules for the lowering's tests: the ways in which people write attention and the linear maps around it."""

# mypy: disable-error-code="no-any-return,no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, POSITIONS = 8, 2, 12
HEAD = WIDTH // HEADS


class Parts(nn.Module):
    """The parameters that the attention modules below choose from."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.rand(HEADS, POSITIONS) + 0.5)
        self.register_buffer("mask", torch.tril(torch.ones(POSITIONS, POSITIONS)).view(1, 1, POSITIONS, POSITIONS))
        self.drop = nn.Dropout(0.5)

    def split(self, x: Tensor) -> list[Tensor]:
        """x (B, T, d) -> q, k, v (B, H, T, d_k)."""
        batch, length, _ = x.shape
        return [part.view(batch, length, HEADS, HEAD).transpose(1, 2) for part in self.qkv(x).split(WIDTH, dim=2)]

    def merge(self, y: Tensor) -> Tensor:
        """(B, H, T, d_k) -> (B, T, d), projected."""
        out: Tensor = self.out(y.transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], WIDTH))
        return out


class NanoGpt(Parts):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        return self.merge(self.drop(F.softmax(scores, dim=-1)) @ v)


class WhereMask(Parts):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.reshape(batch, length, HEADS, -1).permute(0, 2, 1, 3) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(HEAD)
        scores = torch.where(self.mask[..., :length, :length].bool(), scores, torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(batch, length, width))


class SeparateMapsAdditiveMask(Parts):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        scores = q @ k.mT / math.sqrt(HEAD) + torch.full((length, length), float("-inf")).triu(1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class BatchedProducts(Parts):
    """bmm over batch and heads together, and the mask added in another shape."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = (self.q(x) * HEAD**-0.5, self.k(x), self.v(x))
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2).reshape(batch * HEADS, length, -1) for part in parts)
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length)
        scores = scores + (1 - self.mask[:, :, :length, :length]) * -1e9
        mixed = torch.bmm(scores.view(batch * HEADS, length, length).softmax(-1), v)
        return self.out(mixed.view(batch, HEADS, length, -1).transpose(1, 2).reshape(batch, length, width))


class FusedKernel(Parts):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class FusedKernelInterleavedHeads(Parts):
    """q, k, v of each head side by side, and the mask as an argument."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[0, 0, :length, :length].bool()))


class OriginalGpt2Mask(Parts):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        kept = self.mask[:, :, : x.shape[1], : x.shape[1]]
        scores = q @ k.transpose(-1, -2) / math.sqrt(v.size(-1))
        return self.merge((scores * kept - 1e4 * (1 - kept)).softmax(-1) @ v)


class Temperature(Parts):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = q @ k.transpose(-1, -2) / (self.temperature[:, :length, None] * math.sqrt(HEAD))
        return self.merge(scores.masked_fill(self.mask[0, 0, :length, :length] == 0, -1e9).softmax(-1) @ v)


class TemperatureAfterMask(Parts):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = (q @ k.transpose(-1, -2)).masked_fill(self.mask[0, 0, :length, :length] == 0, -torch.inf)
        return self.merge((scores * (1 / self.temperature[:, :length, None]) / 2).softmax(-1) @ v)


class FactorsPerHead(Parts):
    """Private factors that do not depend on the position go into the weights."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = q @ (k * self.temperature[:, :1, None]).transpose(-1, -2) * self.temperature[:, 1].view(1, -1, 1, 1)
        return self.merge(scores.masked_fill(self.mask[0, 0, :length, :length] == 0, -torch.inf).softmax(-1) @ (v * 2))


class OneHead(Parts):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return scores.masked_fill(self.mask[0, 0, :length, :length] == 0, -torch.inf).softmax(-1) @ self.v(x)


class HeadsNotMerged(Parts):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Einsum(Parts):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
        p = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", p, v).reshape(batch, length, width))


class HuggingFace(nn.Module):
    """A convolution of width 1 as `addmm`, the mask sliced from a boolean buffer, tensors for constants."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) * 0.3), nn.Parameter(torch.randn(3 * WIDTH))
        self.register_buffer("bias", torch.tril(torch.ones(POSITIONS, POSITIONS, dtype=torch.bool)).view(1, 1, POSITIONS, POSITIONS))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.b, x.view(-1, x.size(-1)), self.w).view(*x.size()[:-1], 3 * WIDTH)
        q, k, v = (part.view(*part.size()[:-1], HEADS, HEAD).permute(0, 2, 1, 3) for part in y.split(WIDTH, dim=2))
        scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], v.size(-1) ** 0.5, dtype=q.dtype)
        mask = self.bias[:, :, k.size(-2) - q.size(-2) : k.size(-2), : k.size(-2)]
        scores = torch.where(mask, scores.to(q.dtype), torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype))
        mixed = torch.matmul(F.softmax(scores, dim=-1).type(v.dtype), v).transpose(1, 2)
        return mixed.contiguous().view(*mixed.size()[:-2], WIDTH)


class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = q @ k.mT
        scores *= HEAD**-0.5
        scores.masked_fill_(self.mask[0, 0, :length, :length] == 0, -torch.inf)
        return self.merge(scores.softmax(-1) @ v)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out: Tensor = self.attention(x, x, x, attn_mask=future, need_weights=False)[0]
        return out


class SharedHeads(Parts):
    """One head of keys and values for all heads of queries."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD).transpose(1, 2)
        k, v = self.v(x).view(batch, length, 2, 1, HEAD).permute(2, 0, 3, 1, 4)
        k, v = k.repeat_interleave(HEADS, dim=1), v.expand(batch, HEADS, length, HEAD)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class HeadsGiven(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class TwoInputs(Parts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2) for part in (self.q(x), self.k(y), self.v(y)))
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Blocks(nn.Module):
    """A stack whose output is the last position alone."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([NanoGpt(), FusedKernel(), BatchedProducts()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = x + block(x)
        out: Tensor = self.head(x[:, -1])
        return out


class Bidirectional(Parts):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class PositionalBias(Parts):
    """A private bias on the scores: a causal softmax, but not the region."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.split(x)
        scores = q @ k.mT * 0.5 + self.temperature[:, None, :length]
        return self.merge(scores.masked_fill(self.mask[0, 0, :length, :length] == 0, -torch.inf).softmax(-1) @ v)


class WeightsUsedTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        scores = (self.q(x) @ self.k(x).mT).masked_fill(self.mask[0, 0, :length, :length] == 0, -torch.inf)
        p = scores.softmax(-1)
        return p @ self.v(x) + p @ x


class Arithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row, self.number = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.tensor(2.0))
        self.map, self.w, self.each = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, 5)), nn.Parameter(torch.randn(3, WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x) * self.row + x - 1.5
        z = -((2 - y / 4) * x) + self.number * y
        a = torch.addmm(self.row[:5], x[0], self.w)
        b = torch.stack([x[0], x[1], x[0]]) @ self.each
        joined = torch.cat([z @ self.w, a[None].expand(2, -1, -1), b[:2]], dim=-1)
        return joined.mean(1) + y.sum(dim=(1, 2), keepdim=True).squeeze(-1) + x[:, -1, :1] ** 2


class TiedWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.words(ids) + self.places(torch.arange(ids.shape[1])[None]))
        return out


class Chain(nn.Module):
    """Linear maps in a row: those whose product is not larger become one."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 32), nn.Dropout(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.maps(x)
        return out + x + x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6, bias=False), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.a(x) * self.b(x)) + x
        return out


class TwoSoftmaxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, 1) + x.softmax(-1)


class HeadwiseMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, HEADS, HEAD)), nn.Parameter(torch.randn(HEADS, HEAD))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,dhk->bthk", x, self.w) + self.b


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def floats(length: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, length, WIDTH),)


@dataclass(frozen=True)
class Case:
    """A module, its inputs at a length, and the kinds of nodes that it must become (None: only equality is asked)."""

    module: Callable[[], nn.Module]
    ops: str | None = None
    inputs: Callable[[int], tuple[Any, ...]] = floats


REGION = "linear attention linear"
CASES = {
    "nanogpt": Case(NanoGpt, REGION),
    "where mask": Case(WhereMask, REGION),
    "separate maps, additive mask": Case(SeparateMapsAdditiveMask, REGION),
    "bmm": Case(BatchedProducts, REGION),
    "fused kernel": Case(FusedKernel, REGION),
    "interleaved heads": Case(FusedKernelInterleavedHeads, REGION),
    "original gpt-2 mask": Case(OriginalGpt2Mask, REGION),
    "temperature": Case(Temperature, REGION),
    "temperature after mask": Case(TemperatureAfterMask, REGION),
    "factors per head": Case(FactorsPerHead, REGION),
    "one head": Case(OneHead, "linear attention"),
    "heads not merged": Case(HeadsNotMerged, "linear attention reshape permute"),
    "einsum": Case(Einsum, REGION),
    "hugging face": Case(HuggingFace, "linear attention"),
    "in place": Case(InPlace, REGION),
    "torch attention": Case(TorchAttention),
    "shared heads": Case(SharedHeads),
    "heads given": Case(HeadsGiven, None, lambda length: tuple(torch.randn(2, HEADS, length, HEAD) for _ in range(3))),
    "two inputs": Case(TwoInputs, None, lambda length: (*floats(length), *floats(length))),
    "blocks": Case(
        Blocks,
        "linear attention joint_linear linear add attention joint_linear linear add last_position attention last_position joint_linear",
    ),
    "bidirectional": Case(Bidirectional),
    "positional bias": Case(PositionalBias),
    "weights used twice": Case(WeightsUsedTwice),
    "arithmetic": Case(Arithmetic),
    "tied words": Case(TiedWords, "embedding position_bias linear", lambda length: (torch.randint(20, (1, length)),)),
    "chain": Case(Chain, "linear linear add add"),
    "gated": Case(Gated, "linear slice slice mul linear add"),
    "two softmaxes": Case(TwoSoftmaxes, "permute softmax permute softmax add"),
    "headwise map": Case(HeadwiseMap, "linear reshape bias"),
    "doubled": Case(Doubled, "add"),
}
