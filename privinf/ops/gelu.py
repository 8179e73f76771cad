"""GELU, in GPT-2's form and in the exact one."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch

from privinf.graph.builder import Builder, Value, aten, rule
from privinf.ops.relu import Compared
from protocols.activation import FORMS, PRODUCT_BITS
from protocols.activation import gelu as pieces
from protocols.party import Party, Protocol_
from protocols.shares import Shares


class Gelu(Compared):
    """GELU; form `tanh` is GPT-2's, `erf` the exact one."""

    op = "gelu"
    product_bits = PRODUCT_BITS
    most_bits = PRODUCT_BITS
    edge = FORMS["erf"].edge
    form: str

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Which of the two."""

        form: Literal["tanh", "erf"] = "tanh"

    def generic(self, x: Any, *others: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return torch.nn.functional.gelu(x, approximate="tanh" if self.form == "tanh" else "none")
        if self.form == "erf":
            return x.mul(x.div(2**0.5).erf().add(1)).div(2)
        inner = x.add(x.mul(x).mul(x).mul(0.044715)).mul((2 / torch.pi) ** 0.5)
        return x.mul(inner.tanh().add(1)).div(2)

    def function(self, party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
        return pieces(party, x, self.form, compare_bits=self.plan.compare_bits, bits=bits)


@rule(aten.gelu.default)
def gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    """Of any shape."""
    return b.by_rows(Gelu, x, form="tanh" if approximate == "tanh" else "erf")
