"""The two forms of a secret value, as one party holds it. Neither prints, compares nor converts to a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from protocols.ring import add, multiply, subtract


class Hidden:
    """What no secret does: take part in a truth test, a comparison or a conversion to a Python value."""

    __slots__ = ()

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} has no value here: reveal it to a party first")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = __len__ = __array__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Shared(Hidden):
    """A secret of which `value` is this party's share."""

    __slots__ = ()
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Public."""
        return tuple(self.value.shape)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Shares(Shared):
    """x = x_S + x_C in Z_2^bits with `frac` fraction bits; `value` is this party's share.

    `early`: the client's share depends on no query, so that what it sends of it can leave before the query.
    """

    value: Tensor = field(repr=False)
    bits: int
    frac: int
    early: bool = False

    def __repr__(self) -> str:
        return f"Shares(shape={self.shape}, bits={self.bits}, frac={self.frac}, value hidden)"

    def _binary(self, other: Shares, value: Tensor) -> Shares:
        assert self.frac == other.frac, "operands differ in fraction bits"
        return Shares(value, min(self.bits, other.bits), self.frac, self.early and other.early)

    def __add__(self, other: Shares) -> Shares:
        return self._binary(other, add(self.value, other.value))

    def __sub__(self, other: Shares) -> Shares:
        return self._binary(other, subtract(self.value, other.value))

    def __neg__(self) -> Shares:
        return self.with_value(self.value if self.value.is_meta else -self.value)

    def times(self, integer: int | Tensor, frac: int = 0) -> Shares:
        """The product with public integers that carry `frac` fraction bits; local."""
        return Shares(multiply(self.value, integer), self.bits, self.frac + frac, self.early)

    def narrow(self, bits: int) -> Shares:
        """The same value modulo a smaller ring; local."""
        assert bits <= self.bits, "a wider ring needs `rescale`"
        return Shares(self.value, bits, self.frac, self.early)

    def map(self, function: Any) -> Shares:
        """A linear map with small public integer coefficients of the share alone (reshape, slice, gather, sum)."""
        return self.with_value(function(self.value))

    def with_value(self, value: Tensor) -> Shares:
        """Another share in the same ring."""
        return Shares(value, self.bits, self.frac, self.early)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Wire(Hidden):
    """A masked wire: `masked` = x + r is known to both parties, `mask` is this party's share of r, `name` is r's name at the source."""

    masked: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    name: int
    bits: int
    frac: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Public."""
        return tuple(self.masked.shape)

    def __repr__(self) -> str:
        return f"Wire(shape={self.shape}, bits={self.bits}, frac={self.frac}, value hidden)"
