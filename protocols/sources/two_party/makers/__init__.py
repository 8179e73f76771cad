"""A file of makers for each file of protocols; importing this registers them all."""

from protocols.sources.two_party.makers import comparison, exponential, linear, masks, maximum, product

__all__ = ["comparison", "exponential", "linear", "masks", "maximum", "product"]
