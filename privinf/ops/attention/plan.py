"""The ring plan of a softmax attention."""

from __future__ import annotations

from privinf.graph.planning import Bits, Plan
from protocols.exponential import FINER
from protocols.rowrange import DIGITS, RowRange
from protocols.softmax import AttentionRings


class AttentionPlan(Plan, frozen=True, kw_only=True):
    """The rings of `protocols.softmax.AttentionRings` and the fraction bits of the temperatures; these are its attributes on disk."""

    qk_bits: Bits
    q_frac: Bits
    k_frac: Bits
    v_bits: Bits
    v_frac: Bits
    sum_frac: Bits
    product_bits: Bits
    weight_frac: Bits
    bits: Bits
    frac: Bits
    out_frac: Bits
    out_bits: Bits
    row_top: Bits = 0  # `protocols.rowrange.RowRange`; without a depth a maximum is taken
    row_depth: Bits = 0
    row_spread: Bits = 0
    row_by_length: Bits = 0
    row_digit: Bits = DIGITS[-1]
    fine: Bits = 0  # fraction bits of k and v beyond those of q
    score_fine: Bits = 0  # of scores beyond those of other layers

    def __post_init__(self) -> None:
        """A peer's plan is held to what the protocol has tables and bits for."""
        if self.score_fine > FINER:
            raise ValueError("scores with more fraction bits than any table has")
        if self.within is not None and not self.within.has_tables(1):
            raise ValueError("a range of rows that no table holds")

    @property
    def within(self) -> RowRange | None:
        """The range of the rows, where they need no maximum."""
        fields = self.row_top, self.row_depth, self.row_spread, bool(self.row_by_length), self.row_digit
        return RowRange(*fields, fine=self.score_fine) if self.row_depth else None

    @property
    def output(self) -> tuple[int, int]:
        return self.out_bits, self.out_frac

    @property
    def rings(self) -> AttentionRings:
        """For the protocol."""
        return AttentionRings(**{name: getattr(self, name) for name in AttentionRings.__dataclass_fields__})
