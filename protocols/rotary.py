"""Rotary positions: pairs of a head's elements turned by an angle that grows with the position.

Source: RoFormer (arXiv 2104.09864), the pairs being element i and element i + d / 2 as in Llama; its two ways to stretch the angles for
longer contexts. The angles are public, so that each party turns its own shares: no message, and no error but the table's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from protocols.memo import Memo
from protocols.ring import blank, like, nbytes
from protocols.shares import Shares

FRAC = 11  # of the table where it turns without scaling: each product is off by 2^-12 of its factor at most
EXACT_FRAC = 80
_PI = Decimal("3.14159265358979323846264338327950288419716939937510")
_tables = Memo(64 * 2**20)

Wide = Annotated[float, msgspec.Meta(ge=1, le=1e12)]


class Rotation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The angles: position p turns pair i of a head of this width by p theta^(-2 i / width), stretched as `kind` says.

    `linear`: all divided by `factor`. `llama3`: those whose wave is longer than `original` / `low` positions divided by it, those with
    waves shorter than `original` / `high` not, those between by something between.
    """

    width: Annotated[int, msgspec.Meta(ge=2, le=65_536, multiple_of=2)]
    theta: Wide = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: Wide = 1.0
    low: Wide = 1.0
    high: Wide = 4.0
    original: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] = 8192

    def __post_init__(self) -> None:
        """Between the two waves lies what is stretched in part, so that they have an order."""
        if self.kind == "llama3" and self.low >= self.high:
            raise ValueError("low_freq_factor must be below high_freq_factor")

    def angles(self) -> list[Decimal]:
        """Of one position, (width / 2); in decimal arithmetic, the same on every machine: both parties must hold the same integers."""
        with localcontext() as context:
            context.prec = 50
            found = [(Decimal(self.theta).ln() * -2 * i / self.width).exp() for i in range(self.width // 2)]
            if self.kind == "llama3":
                return [self._stretched(angle) for angle in found]
            return [angle / Decimal(self.factor) for angle in found] if self.kind == "linear" else found

    def _stretched(self, angle: Decimal) -> Decimal:
        waves, low, high = self.original * angle / (2 * _PI), Decimal(self.low), Decimal(self.high)
        if waves > high:
            return angle
        part = max((waves - low) / (high - low), Decimal(0))
        return (1 - part) * angle / Decimal(self.factor) + part * angle


def _sine_and_cosine(x: Decimal) -> tuple[int, int]:
    """Of 0 <= x <= 1, times 2^EXACT_FRAC; by their series."""
    with localcontext() as context:
        context.prec = 50
        sums, term = [Decimal(0), Decimal(0)], Decimal(1)
        for k in range(40):
            sums[k % 2] += term if k % 4 < 2 else -term
            term = term * x / (k + 1)
        return round(sums[1] * (1 << EXACT_FRAC)), round(sums[0] * (1 << EXACT_FRAC))


@lru_cache(maxsize=2)
def _exact(rotation: Rotation, end: int) -> tuple[Any, Any]:
    """Cosines and sines of positions below `end`, (end, width / 2) each, with EXACT_FRAC fraction bits: each from the one before."""
    steps = [_sine_and_cosine(angle) for angle in rotation.angles()]
    sine, cosine = (np.array([step[part] for step in steps], dtype=object) for part in (0, 1))
    c, s = np.full_like(cosine, 1 << EXACT_FRAC), np.full_like(sine, 0)
    cosines, sines = [], []
    for _ in range(end):
        cosines.append(c)
        sines.append(s)
        c, s = (c * cosine - s * sine) >> EXACT_FRAC, (s * cosine + c * sine) >> EXACT_FRAC
    return np.array(cosines), np.array(sines)


def frac_of(scale: float) -> int:
    """Fraction bits of the table of a rotation that scales besides: as exact as one that does not."""
    return FRAC + max(0, round(-math.log2(scale)))


@_tables.kept(nbytes)
def _table(rotation: Rotation, end: int, scale: float) -> Tensor:
    """(2, end, width / 2): cosines and sines times `scale`, with `frac_of` it fraction bits."""
    numerator, denominator = scale.as_integer_ratio()
    below = denominator << EXACT_FRAC
    rounded = [(2 * (part * numerator << frac_of(scale)) + below) // (2 * below) for part in _exact(rotation, end)]
    return torch.from_numpy(np.array(rounded).astype(np.int64))


def table(rotation: Rotation, start: int, end: int, scale: float = 1.0) -> Tensor:
    """(2, end - start, width / 2): cosines and sines of these positions, times `scale`, with `frac_of` it fraction bits."""
    return _table(rotation, 1 << (end - 1).bit_length(), scale)[:, start:end]


def turned(x: Any, cosine: Tensor, sine: Tensor, join: Callable[..., Any] = torch.cat) -> Any:
    """x (..., T, width) turned by angles (T, width / 2); floats, or shares and the table's integers."""
    half = cosine.shape[-1]
    first, second = x[..., :half], x[..., half:]
    return join([first * cosine - second * sine, second * cosine + first * sine], -1)


def rotate(
    x: Shares,
    rotation: Rotation,
    windows: Sequence[tuple[int, int]],
    scale: float = 1.0,
    *,
    varying: Callable[[Callable[[int], Tensor]], Tensor] | None = None,
) -> Shares:
    """Shares (..., T, width) at positions (from, to before), turned and scaled; `frac_of(scale)` fraction bits more; local.

    `varying` is the party's (`Party.varying`), of a walk that may be written down. Both parties multiply by the same integers.
    Domain: a result below the ring's half. Error: 2^-12 of |x| for each of two products.
    """
    frac = x.frac + frac_of(scale)
    if x.value.is_meta:
        return Shares(blank(*x.shape), x.bits, frac, x.early)

    def here(further: int) -> Tensor:
        tables = [like(table(rotation, first + further, end + further, scale), x.value) for first, end in windows]
        return tables[0] if len(tables) == 1 else torch.cat(tables, 1)

    cosine, sine = here(0) if varying is None else varying(here)
    return Shares(turned(x.value, cosine, sine), x.bits, frac, x.early)


@lru_cache(maxsize=16)
def floats(rotation: Rotation, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (end - start, width / 2) in float32, exact."""
    angles = torch.tensor([float(angle) for angle in rotation.angles()], dtype=torch.float64)
    found = torch.arange(start, end, dtype=torch.float64)[:, None] * angles
    return found.cos().float(), found.sin().float()


@torch.library.custom_op("privinf::rotary", mutates_args=())
def rotary(x: Tensor, width: int, theta: float, kind: str, factor: float, low: float, high: float, original: int) -> Tensor:
    """x (B, T, heads * width) with every head turned by `Rotation(width, theta, ...)`: one operator, so that an exporter keeps it whole."""
    rotation = Rotation(width, theta, kind, factor, low, high, original)  # type: ignore[arg-type]
    apart = x.reshape(*x.shape[:-1], -1, width).transpose(-2, -3)  # (B, heads, T, width)
    cosine, sine = (part.to(x) for part in floats(rotation, 0, x.shape[-2]))
    found: Tensor = turned(apart, cosine, sine)
    return found.transpose(-2, -3).reshape(x.shape).contiguous()


@rotary.register_fake
def _(x: Tensor, *fields: Any) -> Tensor:
    return torch.empty_like(x)
