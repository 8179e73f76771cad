"""A file of makers for each file of protocols; importing this registers them all."""

from protocols.sources.two_party.makers import comparison, linear, masks, maximum, product

__all__ = ["comparison", "linear", "masks", "maximum", "product"]
