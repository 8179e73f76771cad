"""Importing this makes every kind of correlation known to `correlations.from_wire`; a dealer needs no other part of a protocol."""

from protocols import comparison, exponential, linear, maximum, opening, product, reciprocal, truncation

__all__ = ["comparison", "exponential", "linear", "maximum", "opening", "product", "reciprocal", "truncation"]
