"""A recurrence with a state that does not grow: the node in `node`; its protocol is `protocols.scan`."""

from privinf.ops.scan.node import Scan

__all__ = ["Scan"]
