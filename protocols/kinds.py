"""Importing this makes every kind of correlation known to `correlations.from_wire`; a dealer needs no other part of a protocol."""

from protocols import (
    activation,
    ceiling,
    comparison,
    exponential,
    linear,
    maximum,
    norm,
    opening,
    product,
    reciprocal,
    sequences,
    truncation,
)

__all__ = [
    "activation",
    "ceiling",
    "comparison",
    "exponential",
    "linear",
    "maximum",
    "norm",
    "opening",
    "product",
    "reciprocal",
    "sequences",
    "truncation",
]
