"""What set-up sends where there is no dealer, or of an embedding beside one: weights, encrypted under keys of S's.

Which weights are encrypted, and in which forms, follows from the graph: those that a pass multiplies C's masks by. S's keys are derived
from the seed of the lowering, as the masks of the weights are, and from the weights themselves, which a dealer that was given the seed
does not have; so a part is the same whenever it is made, and S keeps nothing more. What each part's encryption draws is its own, and
no other plaintext ever gets it. All clients are sent the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from privinf.graph.private import Runtime, weights_of
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import Label, module_output, next_token, shape_of
from privinf.version import PROTOCOL
from protocols.correlations import Kind, Role
from protocols.lattice.weights import EncryptedWeight, Form, LatticeKeys, Stored, WeightKeys, encrypt_weight, forms
from protocols.party import Party, Protocol_, Trace
from protocols.prg import SEED_BYTES, derive
from protocols.ring import blank


@dataclass(frozen=True)
class SealedPart:
    """One encrypted weight as set-up sends it: in which form, the bytes of its pieces, and the layer and operator that it counts as."""

    form: Form
    pieces: tuple[int, ...]
    label: Label

    @property
    def size(self) -> int:
        """Bytes, in all."""
        return sum(self.pieces)

    def cut(self, stored: Stored) -> Iterator[memoryview]:
        """Its pieces, one after the other, of all of it."""
        at = 0
        for length in self.pieces:
            yield stored.read(at, length)
            at += length


class Sealing:
    """The encrypted weights of one model, by name; `of` and `tables` find it.

    `forms`: which they are, and in which forms. ConfigError for a weight whose ring is too wide to be encrypted.
    """

    def __init__(self, lowered: Lowered, forms: Iterable[Form]) -> None:
        self._id, self._weights = lowered.id, lowered.sealed  # at C, which derives nothing, the second says nothing
        self._labels = {name: node.label for name, (_, node, _) in weights_of(lowered.graph).items()}
        self._forms = list(forms)

    @property
    def size(self) -> int:
        """Bytes in all; known before anything is as large as a graph may say that a weight is."""
        return sum(form.size for form in self._forms)

    @cached_property
    def parts(self) -> dict[str, SealedPart]:
        """By name, in their order."""
        return {_name(form): SealedPart(form, tuple(form.part_sizes()), self._labels[form.name]) for form in self._forms}

    @staticmethod
    def of(lowered: Lowered) -> Sealing:
        """All that a pass of two parties alone takes; made once for each model."""
        found = _known.get(lowered)
        if found is None:
            found = _known[lowered] = Sealing(lowered, _forms(lowered))
        return found

    @staticmethod
    def tables(lowered: Lowered) -> Sealing:
        """The tables alone that rows are looked up in: an encrypted embedding's, where a dealer makes the correlations."""
        found = _tables.get(lowered)
        if found is None:
            found = _tables[lowered] = Sealing(lowered, _looked(lowered)[0])
        return found

    @staticmethod
    def needless(lowered: Lowered) -> frozenset[str]:
        """Beside an encrypted embedding: tables that nothing is multiplied by, so that nobody needs them masked."""
        found = _needless.get(lowered)
        if found is None:
            tables, kinds = _looked(lowered)
            found = frozenset(form.name for form in tables) - {getattr(kind, "weight", "") for kind in kinds}
            _needless[lowered] = found
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part."""
        return {name: part.size for name, part in self.parts.items()}

    def _seed(self, mask_seed: bytes) -> bytes:
        """Of the keys: another one for each lowering, for other weights, and for each release that encrypts otherwise."""
        return derive(mask_seed, f"keys of the encrypted weights {self._weights} of {self._id}, protocol {PROTOCOL}")

    def _keys(self, mask_seed: bytes) -> LatticeKeys:
        return LatticeKeys(derive(self._seed(mask_seed), "keys")[:SEED_BYTES])

    def key_id(self, mask_seed: bytes) -> str:
        """By which a client knows whether what it has kept is under these keys; it says nothing of them."""
        return hashlib.sha256(derive(self._seed(mask_seed), "name of the keys")).hexdigest()

    def seal(self, mask_seed: bytes, name: str, encoded: Mapping[str, Tensor]) -> Iterator[bytes]:
        """A part as set-up sends it, piece by piece, a message each; the same bytes whenever it is made."""
        form = self.parts[name].form
        return encrypt_weight(self._keys(mask_seed), form, encoded[form.name])

    def read(self, name: str, stored: Stored) -> EncryptedWeight:
        """What C computes with, which stays where it is kept; TransportError for what is no encrypted weight."""
        part = self.parts[name]
        return EncryptedWeight.read(part.form, part.cut(stored), stored)

    def opened(self, mask_seed: bytes, encoded: Mapping[str, Tensor]) -> dict[str, Any]:
        """What S's end of the source takes: the keys of what is encrypted, and the other weights themselves."""
        keys = self._keys(mask_seed)
        return {**encoded, **{part.form.name: WeightKeys(keys, part.form.name) for part in self.parts.values()}}


_known: WeakKeyDictionary[Lowered, Sealing] = WeakKeyDictionary()
_tables: WeakKeyDictionary[Lowered, Sealing] = WeakKeyDictionary()
_needless: WeakKeyDictionary[Lowered, frozenset[str]] = WeakKeyDictionary()


def _name(form: Form) -> str:
    return f"{form.name} in {form.bits} bits{', transposed' if form.transposed else ''}{', by rows' if form.chosen else ''}"


class _Looked:
    """See `Tables`: notes of which tables rows are looked up."""

    def __init__(self) -> None:
        self.forms: dict[Form, None] = {}

    def lookup(self, table: str, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """See `Tables`; on shapes."""
        self.forms[Form(table, size, out, bits, chosen=True)] = None
        yield []
        return blank(ids.shape[0], out)


def _looked(lowered: Lowered) -> tuple[list[Form], list[Kind]]:
    """The tables and the correlations of a pass over one position; a longer one has the same weights and tables."""
    trace, info = Trace(Role.CLIENT, costs=False), lowered.info
    party = Party(Role.CLIENT, trace)
    party.tables = looked = _Looked()
    runtime = Runtime.of(lowered.graph, party)
    if info.is_language_model:
        next_token(lowered.graph, runtime, blank(1, 1), logits=False)
    else:
        module_output(lowered.graph, runtime, [shape_of(spec) for spec in info.inputs])
    return list(looked.forms), trace.kinds


def _forms(lowered: Lowered) -> list[Form]:
    tables, kinds = _looked(lowered)
    return [*tables, *forms(kinds)]
