"""A file of makers for each file of protocols; importing this registers them all."""

from protocols.sources.two_party.makers import (
    activation,
    ceiling,
    comparison,
    exponential,
    linear,
    masks,
    maximum,
    norm,
    product,
    reciprocal,
    sequences,
)

__all__ = ["activation", "ceiling", "comparison", "exponential", "linear", "masks", "maximum", "norm", "product", "reciprocal", "sequences"]
