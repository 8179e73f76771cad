"""One party's end of encrypted linear algebra."""

from __future__ import annotations

from torch import Tensor

from protocols.correlations import Role
from protocols.lattice import gilboa
from protocols.lattice.gilboa import Products
from protocols.rounds import Protocol_


class Lattice:
    """One party's end, for one session; `traced`: on blanks, for a prediction.

    `transfers` are the same session's oblivious transfers, which carry what is too small for a ciphertext.
    """

    def __init__(self, role: Role, transfers: Products, traced: bool = False) -> None:
        self.role, self.transfers, self.traced = role, transfers, traced

    def start(self) -> Protocol_[None]:
        """Once a session. No message."""
        return
        yield []

    def matmul(self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None) -> Protocol_[Tensor]:
        """Shares of left @ right modulo 2^bits -> (..., n, m); left (..., n, d) at the other party, right (..., d, m) at `holder`.

        Each passes a blank for what it does not know; entries are any representatives. `need` (n, m), bool and public: which outputs are
        wanted; what the others are is not said.
        """
        return (yield from gilboa.matmul(self.transfers, holder, left, right, bits))
