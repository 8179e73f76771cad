"""What set-up sends where there is no dealer: the weights, encrypted under a key of S's.

Which weights are encrypted, and for which products, follows from the graph: those that a pass multiplies C's masks by. S's key is derived
from the seed of the lowering, as the masks of the weights are, so that a part is the same whenever it is made and S keeps nothing
more; what each part's encryption draws is its own, and no other plaintext ever gets it. All clients are sent the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from privinf.graph.private import Runtime, weights_of
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import Label, module_output, next_token, shape_of
from privinf.trust import DEALER, TWO_PARTY
from privinf.version import PROTOCOL
from protocols.correlations import Role
from protocols.errors import ConfigError
from protocols.linear import LinearMask, Weight
from protocols.party import Party, Trace
from protocols.prg import derive
from protocols.ring import blank

MESSAGE = 4 * 2**20
"""Bytes of one message of set-up, at most."""


@dataclass(frozen=True)
class SealedPart:
    """One encrypted weight as set-up sends it: for which products it is, its bytes, and the layer and operator that they count as."""

    weight: Weight
    bits: int
    transposed: bool
    size: int
    label: Label

    def messages(self) -> Iterator[int]:
        """The lengths of the messages that it comes in."""
        for start in range(0, self.size, MESSAGE):
            yield min(MESSAGE, self.size - start)


class Sealing:
    """The encrypted weights of one model, by name; `of` finds it."""

    def __init__(self, lowered: Lowered) -> None:
        self._id = lowered.id
        labels = {name: node.label for name, (_, node, _) in weights_of(lowered.graph).items()}
        weights = {name: weight for name, (weight, _, _) in weights_of(lowered.graph).items()}
        self.parts: dict[str, SealedPart] = {}
        for name, bits, transposed in _products(lowered):
            size = encrypted_size(weights[name], bits, transposed)
            self.parts[f"{name} transposed" if transposed else name] = SealedPart(weights[name], bits, transposed, size, labels[name])

    @staticmethod
    def of(lowered: Lowered) -> Sealing:
        """Made once for each model."""
        found = _known.get(lowered)
        if found is None:
            found = _known[lowered] = Sealing(lowered)
        return found

    def _seed(self, mask_seed: bytes) -> bytes:
        """Of the key: another one for each lowering, and for each release that encrypts otherwise."""
        return derive(mask_seed, f"key of the encrypted weights of {self._id}, protocol {PROTOCOL}")

    def key_id(self, mask_seed: bytes) -> str:
        """By which a client knows whether what it has kept is under this key; it says nothing of it."""
        return hashlib.sha256(derive(self._seed(mask_seed), "name of the key")).hexdigest()

    def seal(self, mask_seed: bytes, name: str, encoded: Mapping[str, Tensor]) -> Iterator[memoryview]:
        """A part as set-up sends it, message by message; the same bytes whenever it is made."""
        part = self.parts[name]
        data = encrypt_weight(self._seed(mask_seed), part.weight, encoded[part.weight.name], part.bits, part.transposed)
        assert len(data) == part.size
        at = 0
        for length in part.messages():
            yield data[at : at + length]
            at += length

    def read(self, name: str, data: memoryview) -> Any:
        """What C computes with; HandshakeError for what is no encrypted weight."""
        part = self.parts[name]
        return read_weight(data, part.weight, part.bits, part.transposed)

    def opened(self, mask_seed: bytes, encoded: Mapping[str, Tensor]) -> dict[str, Any]:
        """What S's end of the source takes for its weights."""
        return dict(encoded)


_known: WeakKeyDictionary[Lowered, Sealing] = WeakKeyDictionary()


def _products(lowered: Lowered) -> list[tuple[str, int, bool]]:
    """(weight, ring, transposed) of the products with masks of C's, but for the diagonal ones, in the order of a pass."""
    trace, info = Trace(Role.CLIENT, costs=False), lowered.info
    runtime = Runtime.of(lowered.graph, Party(Role.CLIENT, trace))
    if info.is_language_model:
        next_token(lowered.graph, runtime, blank(1, 1), logits=False)
    else:
        module_output(lowered.graph, runtime, [shape_of(spec) for spec in info.inputs])
    found: dict[tuple[str, bool], int] = {}
    for kind in trace.kinds:
        if isinstance(kind, LinearMask) and not kind.diagonal:
            place = kind.weight, bool(kind.transposed)
            found[place] = max(found.get(place, 0), kind.bits)
    return [(name, bits, transposed) for (name, transposed), bits in found.items()]


def encrypted_size(weight: Weight, bits: int, transposed: bool) -> int:
    """Bytes of an encrypted weight; ConfigError, as long as none can be encrypted."""
    raise ConfigError(f"the trust model {TWO_PARTY} cannot be had yet: weights cannot be encrypted", remedy=f"use {DEALER}")


def encrypt_weight(seed: bytes, weight: Weight, encoded: Tensor, bits: int, transposed: bool) -> memoryview:
    """An encrypted weight."""
    raise NotImplementedError


def read_weight(data: memoryview, weight: Weight, bits: int, transposed: bool) -> Any:
    """What C keeps of it."""
    raise NotImplementedError
