"""Causal attention: the node in `node`, how a region of a graph is seen to be one in `region`, and what takes its place in `recognise`."""

from privinf.ops.attention import recognise as _recognise  # noqa: F401  registers the recogniser
from privinf.ops.attention.node import CausalAttention

__all__ = ["CausalAttention"]
