"""What an operator's part of the ring plan is, and what it may ask when it makes that part.

The ring plan is the ring and the fraction bits of every wire and every weight, from value ranges. Widths that follow from value
ranges are rounded up to multiples of 4, so that they say little about the weights. Notation: a value below 2^m in size with f
fraction bits needs f + m + 2 bits where it is rescaled to a wider ring (one bit of sign, one of headroom; `protocols.truncation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.info import Info
from protocols.errors import RangeError
from protocols.matrix import WIDEST

FRAC = 15  # of activations between nodes
DIAGONAL_FRAC = 14
# Rounding to f fraction bits is off by 2^-f / sqrt(6) (standard deviation; truncation) or 2^-f / sqrt(12) (encoding). A linear map
# multiplies that of x by the norm of a column, that of its weight by the norm of x, which is the larger one; a ring pays for the sum
# of the two, and rounding x to fewer fraction bits before the map is a reduction, for nothing.
INPUT_FRAC, MATRIX_FRAC = 14, 16
MOST_FINE = 2  # fraction bits of some columns of a weight beyond the others'
TABLE_FRAC = 14  # of the embedding's table
COMPARED_FRAC = 14  # of what is compared elementwise
LOGIT_FRAC = 8  # of logits that are compared
SHOWN_FRAC = 10  # of those that a client is given, as of any output that is revealed
HEAD_FRAC = 12  # of what the head makes, for both: from there each is a reduction
SMALLEST = 2.0**-8  # of a range: smaller ones are not told apart

SMALLEST_RANGE = 2.0**-10  # of a value that is zero throughout

Bits = Annotated[int, msgspec.Meta(ge=0, le=64)]


class Plan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A node's part of the ring plan: small public integers, in the order in which they stand on disk. Every kind of plan has

    - `bits`, `frac`: the ring in which values travel between nodes, the same all over the graph.
    """

    if TYPE_CHECKING:  # each kind of plan declares them at the place that they have on disk
        bits: int
        frac: int

    def record(self) -> dict[str, int]:
        """As it stands on disk and in the bundle, whose hash is the model's id: the order counts."""
        return dict(msgspec.to_builtins(self))

    @property
    def needs(self) -> int:
        """Bits that the node's input must have for what the node does with it."""
        return 0

    def input_ring(self, frac: int) -> int | None:
        """The ring in which the node would have its input, with `frac` fraction bits, from a node that can make any; None: the graph's."""
        return None

    @property
    def first(self) -> tuple[int, int] | None:
        """Ring and fraction bits in which the node would have what it reads first, where only it reads that; None: as it comes."""
        return None

    @property
    def output(self) -> tuple[int, int] | None:
        """Ring and fraction bits of what the node makes; None where its reader gets a product as it is."""
        return self.bits, self.frac


class PassingPlan(Plan, frozen=True, kw_only=True):
    """Of a node that computes in the ring of its inputs."""

    bits: Bits
    frac: Bits


class ProductPlan(Plan, frozen=True, kw_only=True):
    """Of a node that multiplies; it declares

    - `ring`: of the product, before it is rounded to the graph's fraction bits.
    """

    if TYPE_CHECKING:
        ring: int

    @property
    def needs(self) -> int:
        return self.ring


class Wanted(NamedTuple):
    """What a node that opens what it reads wants of the linear map that makes it.

    `headroom`: the bits above the fraction that the map's ring must have, so that every truncation up to the opening is a reduction,
    which costs no message; `in_frac` and at most `weight_frac`: the fraction bits of what the map multiplies. `least`: the bits that do
    where more are dear to the map, for messages in the node. `fine`: columns, from and to before, that need fewer, and how many: what
    the ring has besides can be fraction bits of their weight.
    """

    headroom: int
    in_frac: int = INPUT_FRAC
    weight_frac: int = MATRIX_FRAC
    least: int = 0
    fine: tuple[int, int, int] = (0, 0, 0)


class Shown(NamedTuple):
    """One wire or weight of the plan, for people.

    `bound` is the largest size that the plan provides for, `origin` what that follows from (None: the calibration).
    """

    wire: str
    bits: int
    frac: int
    bound: float | None
    origin: str | None = None


def power_of_two(value: float) -> float:
    """The smallest power of two that is at least `value`."""
    if value <= SMALLEST_RANGE:
        return SMALLEST_RANGE
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def up(bits: float) -> int:
    """Rounded up to a multiple of 4."""
    return 4 * math.ceil(bits / 4)


def is_small(weight: Tensor, frac: int) -> bool:
    """Whether an encoded weight is one limb (`protocols.matrix`): at 14 fraction bits below 128, as every weight should be."""
    return float(weight.abs().max()) * 2.0**frac < (1 << (WIDEST - 1)) - 1


def bits_for(layer: str, frac: int, bound: float) -> int:
    """The ring of values up to `bound` with `frac` fraction bits; RangeError if none of 64 bits holds them."""
    bits = up(frac + math.log2(max(bound, SMALLEST)) + 2)
    if bits > 64:
        raise RangeError(f"values up to {bound:g} with {frac} fraction bits do not fit a ring of 64 bits", layer=layer)
    return bits


@dataclass
class Planning:
    """What a node may ask when it makes its plan.

    Every node is asked twice, in the graph's order: first for what it needs, while `bits` is 0 and `plans` holds only those of earlier
    nodes, then for good, with the graph's ring and the first plans of all. `ranges` are the largest sizes, headroom included, of each
    node's `out` and of what it measures besides.
    """

    graph: Graph
    ranges: Mapping[str, Mapping[str, float]]
    info: Info
    bits: int = 0
    frac: int = FRAC
    plans: dict[str, Plan] = field(default_factory=dict)
    _sources: dict[str, tuple[str, ...]] = field(init=False)
    _readers: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._sources = {name: inputs for name, _, inputs in self.graph.named_nodes()}
        self._readers = {}
        for name, inputs in self._sources.items():
            for read in dict.fromkeys(inputs):
                self._readers.setdefault(read, []).append(name)

    def out(self, name: str) -> float:
        """The range of a node's value."""
        return float(self.ranges[name]["out"])

    def source(self, name: str) -> str:
        """What a node reads first."""
        return self._sources[name][0]

    def input_range(self, name: str, unknown: float) -> float:
        """The range of what a node reads first; of an input that was not measured, `unknown`."""
        return float(self.ranges.get(self.source(name), {}).get("out", unknown))

    def sole_reader(self, name: str) -> bool:
        """Whether one node reads a value, and as it is."""
        return len(self._readers.get(name, ())) == 1 == len(self.readers(name)) and self.readers(name)[0].name in self._readers[name]

    def fine(self, name: str) -> int:
        """The fraction bits that columns of what a node reads have besides; those that it asked for."""
        return int(getattr(self.plans.get(self.source(name)), "fine", 0))

    def readers(self, name: str) -> list[Any]:
        """The nodes that read a value, through those that only take its last position."""
        found: list[Any] = []
        for reader in self._readers.get(name, ()):
            node = self.graph.node(reader)
            found += self.readers(reader) if node.takes_last_position else [node]
        return found

    def fracs(self, name: str) -> list[int]:
        """The fraction bits of what a node reads: the graph's, or more where what makes it has finer results."""
        plans = [self.plans.get(source) for source in self._sources[name]]
        return [max(FRAC, plan.output[1]) if plan is not None and plan.output is not None else FRAC for plan in plans]

    def multiplied(self, name: str) -> bool:
        """Whether a value is read by products alone, which take any fraction bits; moved about in between, or not."""
        readers = [(reader, self.graph.node(reader)) for reader in self._readers.get(name, ())]
        alone = [
            node.multiplies or (node.moves and len(self._sources[reader]) == 1 and self.multiplied(reader)) for reader, node in readers
        ]
        return bool(alone) and all(alone) and not self.is_output(name)

    def tied_to(self, name: str) -> Iterator[Plan]:
        """The plans of the maps whose weight is a table's, transposed; none yet when nodes are asked first."""
        for node in self.graph.nodes:
            if node.tied_to == name and node.name in self.plans:
                yield self.plans[node.name]

    def reads_ids(self) -> bool:
        """Whether what the graph takes first are token ids."""
        return self.info.input_kind == "ids"

    def is_output(self, name: str) -> bool:
        """Whether a value is the graph's."""
        return name in self.graph.output_names

    def maker(self, name: str) -> Any:
        """The node that makes what a node reads first; None if it is an input of the graph."""
        return self.graph._modules.get(self.source(name))

    def output_for_readers(self, name: str) -> tuple[int, int]:
        """(ring, fraction bits) in which the readers of a value want it, if all of them are linear maps; else those of the graph."""
        plans = [self.plans.get(reader.name) for reader in self.readers(name)]
        if self.sole_reader(name) and plans[0] is not None and plans[0].first is not None:
            reader = self.readers(name)[0].name
            return plans[0].first if self.source(reader) == name else (self.bits, self.frac)
        frac = FRAC if plans and all(getattr(plan, "in_frac", 0) >= FRAC for plan in plans) else INPUT_FRAC
        rings = [None if plan is None else plan.input_ring(frac) for plan in plans]
        known = [ring for ring in rings if ring is not None]
        return (max(known), frac) if known and len(known) == len(rings) else (self.bits, self.frac)
