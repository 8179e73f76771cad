"""A lowered model: the graph, what is known about it, and the two forms in which it travels.

On the server's disk it is a directory with the weights (`storage`); to the client goes the public bundle, which holds the
graph's structure, the ring plan, the tokenizer and digests of what set-up will send, and nothing else that depends on the weights.

A model's id is the SHA-256 of its bundle, so whoever compares ids has compared everything: a bundle under an id, or a masked weight
under a bundle, is the one that was lowered or is refused. The id says nothing of the weights. What set-up sends is W + B with B from a
seed drawn for this lowering, uniform to whoever does not know the seed; so are its digests. The dealer knows the seed, and could test a
guess of W by a digest: so the bundle, which the dealer is never sent, also holds fresh random bytes, without which its hash is noise.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.lowering.calibrate import Ranges, calibrate
from privinf.lowering.plan import plan_rings, weights_of
from privinf.lowering.rules import check_graph
from protocols.errors import ConfigError, HandshakeError
from protocols.linear import Weight, mask_weight
from protocols.ring import encode, pack, packed_size

Plan = dict[str, dict[str, Any]]

MASK_SEED_BYTES = SALT_BYTES = 32


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input of the graph; a size of None is any length from 1 to n_positions."""

    name: str
    kind: Literal["ids", "float"]
    shape: tuple[int | None, ...]


class Info(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is, for people and for the handshake. Sizes are 0 where a lowered module has no such thing."""

    variant: str
    inputs: tuple[InputSpec, ...]
    output: tuple[int, ...]
    layers: int = 0
    heads: int = 0
    width: int = 0
    vocab: int = 0
    n_positions: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    chat_template: str = ""  # Jinja, as the checkpoint's tokenizer has it; empty if it has none

    @property
    def any_length(self) -> bool:
        """Whether the graph takes inputs of any length (a converted checkpoint) or of one shape (a lowered module)."""
        return any(None in spec.shape for spec in self.inputs)

    @property
    def input_kind(self) -> Literal["ids", "float"]:
        return self.inputs[0].kind

    @property
    def is_language_model(self) -> bool:
        return self.any_length and len(self.inputs) == 1 and self.inputs[0].kind == "ids"


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that set-up sends: its bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: memoryview) -> Item:
        """What stands for this."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


class SetUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that set-up sends, by name: the masked weights. `salt` is random, and makes the bundle's hash say nothing to who lacks it."""

    items: dict[str, Item]
    salt: bytes


class Lowered:
    """A graph ready for private inference. `mask_seed`, the weights and `ranges` exist at the server alone."""

    def __init__(
        self,
        graph: Graph,
        info: Info,
        *,
        plan: Plan,
        setup: SetUp | None = None,
        ranges: Ranges | None = None,
        tokenizer: bytes | None = None,
        mask_seed: bytes | None = None,
        headroom: float = 4.0,
        sealed: str | None = None,
    ) -> None:
        self.graph = graph
        self.info = info
        self.plan: Plan = {}
        self.ranges: Ranges = ranges or {}
        self.tokenizer = tokenizer
        self.mask_seed = mask_seed
        self.headroom = headroom
        self.set_plan(plan)
        self.setup = setup or SetUp(self._masked_items(), secrets.token_bytes(SALT_BYTES))
        self.sealed = sealed or self._digest()

    def __repr__(self) -> str:
        return f"Lowered({self.info.variant}, id {self.id}, {len(self.graph.nodes)} nodes{'' if self.has_weights else ', no weights'})"

    @property
    def has_weights(self) -> bool:
        """True at the server; a graph from a bundle has shapes only."""
        return all(node.has_values for node in self.graph.nodes)

    @functools.cached_property
    def id(self) -> str:
        """SHA-256 of the bundle, in hexadecimal."""
        return hashlib.sha256(self.bundle()).hexdigest()

    @property
    def tokenizer_id(self) -> str | None:
        """SHA-256 of the tokenizer's file, in hexadecimal; None where there is none."""
        return None if self.tokenizer is None else hashlib.sha256(self.tokenizer).hexdigest()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for node in self.graph.nodes:
            for key in node.parameter_shapes if node.has_values and not getattr(node, "tied_to", None) else ():
                value = node.value(key).detach().cpu().contiguous()
                digest.update(str(value.dtype).encode())
                digest.update(value.numpy())
        return digest.hexdigest()

    def _masked_items(self, *names: str) -> dict[str, Item]:
        """What stands for the masked weights in the bundle; all, or those that are named."""
        return {
            name: Item.of(masked(encode(node.value(key).detach(), weight.frac), self.mask_seed, weight))
            for name, (weight, node, key) in weights_of(self.graph).items()
            if self.mask_seed is not None and (not names or name in names)
        }

    def check_weights(self) -> None:
        """ConfigError if the weights, or the seed of their masks, are not those that were lowered.

        Two versions of a weight under one mask would give both away. The seed is known by the smallest item, which is made again.
        """
        smallest = min(self.setup.items, key=lambda name: self.setup.items[name].size, default=None)
        same = self._digest() == self.sealed
        if not same or (smallest is not None and self._masked_items(smallest) != {smallest: self.setup.items[smallest]}):
            what = "the weights have been changed" if not same else "the seed of the weights' masks, or what makes masks of it, has changed"
            raise ConfigError(f"{what} since they were lowered", remedy="lower the changed model anew")

    def set_plan(self, plan: Plan) -> None:
        """Take over a ring plan; each node gets its own part as `node.plan`."""
        surplus = set(plan) - {node.name for node in self.graph.nodes} - set(self.graph.input_names)
        if surplus:
            raise ConfigError(f"the ring plan names what is not in the graph: {', '.join(sorted(surplus)[:5])}")
        self.plan = plan
        for node in self.graph.nodes:
            node.plan = plan.get(node.name, {})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the directory that `serve` reads: 0700, whole or not at all, no pickle."""
        from privinf.lowering.storage import save_lowered

        save_lowered(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Lowered:
        """Read a directory that `save` wrote; ConfigError names what is missing, surplus or damaged."""
        from privinf.lowering.storage import load_lowered

        return load_lowered(directory)

    def bundle(self) -> bytes:
        """What the client gets: structure, shapes, ring plan, digests of masked weights, tokenizer; no weight, no range, no seed."""
        from privinf.lowering.schema import Bundle, manifest_of

        return msgspec.json.encode(Bundle(manifest_of(self, public=True), self.tokenizer))

    @classmethod
    def from_bundle(cls, data: bytes) -> Lowered:
        """Read a bundle that came from the peer; HandshakeError names what is wrong with it."""
        from privinf.lowering.schema import Bundle, build_graph, decode

        try:
            bundle = decode(data, Bundle)
            graph = build_graph(bundle.graph, {})
            check_graph(graph, bundle.graph.info)
            made = cls(graph, bundle.graph.info, plan=bundle.graph.plan, setup=bundle.graph.setup, tokenizer=bundle.tokenizer)
        except ConfigError as error:
            raise HandshakeError(f"the model bundle of the server is not valid: {error}") from None
        made.id = hashlib.sha256(data).hexdigest()  # of what came, however it was written
        return made


def masked(encoded: Tensor, seed: bytes, weight: Weight) -> memoryview:
    """A weight as set-up sends it: W + B, packed."""
    return pack(mask_weight(encoded, seed, weight), weight.bits).data


def packed_bytes(weight: Weight) -> int:
    """Of a masked weight, on the wire and in its file."""
    return packed_size(math.prod(weight.shape), weight.bits)


def finish_lowering(
    graph: Graph,
    info: Info,
    inputs: Sequence[Sequence[Tensor]],
    *,
    tokenizer: bytes | None = None,
    headroom: float = 4.0,
) -> Lowered:
    """Check a new graph, measure its ranges, plan its rings, draw the seed of its weight masks, and take the digests of what they mask.

    The seed is fresh: two lowerings of the same weights share no mask, or the masks' difference would give the weights away.
    """
    check_graph(graph, info)
    ranges = calibrate(graph, inputs, headroom)
    return Lowered(
        graph,
        info,
        plan=plan_rings(graph, ranges, info),
        ranges=ranges,
        tokenizer=tokenizer,
        mask_seed=secrets.token_bytes(MASK_SEED_BYTES),
        headroom=headroom,
    )
