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
import os
import secrets
from collections.abc import Mapping, Sequence

import msgspec
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.info import Info
from privinf.graph.planning import Plan
from privinf.graph.private import weights_of
from privinf.lowering.calibrate import Ranges, calibrate
from privinf.lowering.offsets import without_idle_offsets
from privinf.lowering.plan import plan_rings
from privinf.lowering.rules import check_graph
from privinf.lowering.schema import Bundle, Saved, build_graph, build_plan, decode, manifest_of
from privinf.lowering.setup import SALT_BYTES, SetUp, SetupItem, masked
from privinf.lowering.storage import MASK_SEED_BYTES, Stored, load_model, naming, save_model
from protocols.errors import ConfigError, HandshakeError, RangeError
from protocols.ring import encode


class Lowered:
    """A graph ready for private inference. `mask_seed`, the weights and `ranges` exist at the server alone."""

    def __init__(
        self,
        graph: Graph,
        info: Info,
        *,
        plan: Mapping[str, Plan],
        setup: SetUp | None = None,
        ranges: Ranges | None = None,
        tokenizer: bytes | None = None,
        mask_seed: bytes | None = None,
        headroom: float = 4.0,
        sealed: str | None = None,
    ) -> None:
        self.graph = graph
        self.info = info
        self.plan = dict(plan)
        self.ranges: Ranges = ranges or {}
        self.tokenizer = tokenizer
        self.mask_seed = mask_seed
        self.headroom = headroom
        for node in graph.nodes:
            node.plan = plan[node.name]
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
            for key in node.own_parameters if node.has_values else ():
                value = node.value(key).detach().cpu().contiguous()
                digest.update(str(value.dtype).encode())
                digest.update(value.numpy())
        return digest.hexdigest()

    def _masked_items(self, *names: str) -> dict[str, SetupItem]:
        """What stands for the masked weights in the bundle; all, or those that are named."""
        return {
            name: SetupItem.of(masked(encode(node.encoded_value(key).detach(), weight.frac), self.mask_seed, weight))
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

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the directory that `serve` reads: 0700, whole or not at all, no pickle."""
        if self.mask_seed is None or not self.has_weights:
            raise ConfigError("this model came as a bundle, without weights: only the server can save it")
        self.check_weights()
        saved = Saved(manifest_of(self.graph, self.info, self.setup), self.ranges, self.headroom, self.sealed, self.id)
        save_model(Stored(saved, self.graph, self.tokenizer, self.mask_seed), directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Lowered:
        """Read a directory that `save` wrote; ConfigError names what is missing, surplus or damaged."""
        stored = load_model(directory)
        with naming(directory):
            saved, graph = stored.saved, stored.graph
            lowered = cls(
                graph,
                saved.graph.info,
                plan=build_plan(graph, saved.graph),
                setup=saved.graph.setup,
                ranges=saved.ranges,
                tokenizer=stored.tokenizer,
                mask_seed=stored.mask_seed,
                headroom=saved.headroom,
                sealed=saved.weights_sha256,
            )
            lowered.check_weights()
            if lowered.id != saved.id:
                raise ConfigError("what is public of the model is not what was lowered: its id would be another")
            return lowered

    def bundle(self) -> bytes:
        """What the client gets: structure, shapes, ring plan, digests of masked weights, tokenizer; no weight, no range, no seed."""
        return msgspec.json.encode(Bundle(manifest_of(self.graph, self.info, self.setup, public=True), self.tokenizer))

    @classmethod
    def from_bundle(cls, data: bytes) -> Lowered:
        """Read a bundle that came from the peer; HandshakeError names what is wrong with it."""
        try:
            bundle = decode(data, Bundle)
            graph = build_graph(bundle.graph, {})
            check_graph(graph, bundle.graph.info)
            made = cls(graph, bundle.graph.info, plan=build_plan(graph, bundle.graph), setup=bundle.graph.setup, tokenizer=bundle.tokenizer)
        except ConfigError as error:
            raise HandshakeError(f"the model bundle of the server is not valid: {error}") from None
        made.id = hashlib.sha256(data).hexdigest()  # of what came, however it was written
        return made


def finish_lowering(
    graph: Graph,
    info: Info,
    inputs: Sequence[Sequence[Tensor]],
    *,
    tokenizer: bytes | None = None,
    headroom: float = 4.0,
    scored: bool = False,
    again: Sequence[Sequence[Tensor]] = (),
) -> Lowered:
    """Check a new graph, measure its ranges, plan its rings, draw the seed of its weight masks, and take the digests of what they mask.

    The seed is fresh: two lowerings of the same weights share no mask, or the masks' difference would give the weights away. Where no
    ring holds what comes of `again` too, rings are planned without it.
    """
    check_graph(graph, info)

    def planned() -> tuple[Ranges, dict[str, Plan]]:
        found = calibrate(graph, inputs, headroom, scored=scored, again=again)
        return found, plan_rings(graph, found, info)

    try:
        ranges, plan = planned()
    except RangeError:
        if not again:
            raise
        again = ()
        ranges, plan = planned()
    if without_idle_offsets(graph, plan):
        ranges, plan = planned()
    return Lowered(
        graph,
        info,
        plan=plan,
        ranges=ranges,
        tokenizer=tokenizer,
        mask_seed=secrets.token_bytes(MASK_SEED_BYTES),
        headroom=headroom,
    )


load = Lowered.load
