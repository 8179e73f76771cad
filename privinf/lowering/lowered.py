"""A lowered model: the graph, what is known about it, and the two forms in which it travels.

On the server's disk it is a directory with the weights (`storage`); to the client goes the public bundle, which holds the
graph's structure, the ring plan and the tokenizer, and nothing else that depends on the weights.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.lowering.calibrate import Ranges, calibrate
from privinf.lowering.rules import check_graph
from protocols.errors import ConfigError, HandshakeError

Plan = dict[str, dict[str, Any]]

MASK_SEED_BYTES = 32


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
    id: str = ""  # 128 random bits in hex, drawn at lowering
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


class Lowered:
    """A graph ready for private inference. `mask_seed`, the weights and `ranges` exist at the server alone."""

    def __init__(
        self,
        graph: Graph,
        info: Info,
        *,
        plan: Plan | None = None,
        ranges: Ranges | None = None,
        tokenizer: bytes | None = None,
        mask_seed: bytes | None = None,
        headroom: float = 4.0,
    ) -> None:
        self.graph = graph
        self.info = info
        self.plan: Plan = {}
        self.ranges: Ranges = ranges or {}
        self.tokenizer = tokenizer
        self.mask_seed = mask_seed
        self.headroom = headroom
        self.set_plan(plan or {})
        self._sealed = self._digest()

    def __repr__(self) -> str:
        return f"Lowered({self.info.variant}, id {self.info.id}, {len(self.graph.nodes)} nodes{'' if self.has_weights else ', no weights'})"

    @property
    def has_weights(self) -> bool:
        """True at the server; a graph from a bundle has shapes only."""
        return all(node.has_values for node in self.graph.nodes)

    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for node in self.graph.nodes:
            for key in node.parameter_shapes if node.has_values and not getattr(node, "tied_to", None) else ():
                digest.update(node.value(key).detach().cpu().contiguous().numpy())
        return digest.digest()

    def check_weights(self) -> None:
        """ConfigError if the weights are not those that were lowered: two versions under one mask would give both away."""
        if self._digest() != self._sealed:
            raise ConfigError("the weights have been changed since they were lowered", remedy="lower the changed model anew")

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
        """What the client gets: structure, parameter shapes, ring plan, tokenizer; no weight, no range, no seed."""
        from privinf.lowering.schema import Bundle, Manifest, records_of

        records = records_of(self.graph, public=True)
        manifest = Manifest(self.info, tuple(self.graph.input_names), tuple(self.graph.output_names), records, self.plan)
        return msgspec.json.encode(Bundle(manifest, self.tokenizer))

    @classmethod
    def from_bundle(cls, data: bytes) -> Lowered:
        """Read a bundle that came from the peer; HandshakeError names what is wrong with it."""
        from privinf.lowering.schema import Bundle, build_graph, decode

        try:
            bundle = decode(data, Bundle)
            graph = build_graph(bundle.graph, {})
            check_graph(graph, bundle.graph.info)
            return cls(graph, bundle.graph.info, plan=bundle.graph.plan, tokenizer=bundle.tokenizer)
        except ConfigError as error:
            raise HandshakeError(f"the model bundle of the server is not valid: {error}") from None


def finish_lowering(
    graph: Graph,
    info: Info,
    inputs: Sequence[Sequence[Tensor]],
    *,
    tokenizer: bytes | None = None,
    headroom: float = 4.0,
) -> Lowered:
    """Check a new graph, measure its ranges, plan its rings, and draw its id and the seed of its weight masks.

    Both are fresh: two lowerings of the same weights share no mask, or the masks' difference would give the weights away.
    """
    info = msgspec.structs.replace(info, id=secrets.token_hex(16))
    check_graph(graph, info)
    ranges = calibrate(graph, inputs, headroom)
    lowered = Lowered(
        graph,
        info,
        ranges=ranges,
        tokenizer=tokenizer,
        mask_seed=secrets.token_bytes(MASK_SEED_BYTES),
        headroom=headroom,
    )
    lowered.set_plan(plan_of(graph, ranges, info))
    return lowered


def plan_of(graph: Graph, ranges: Ranges, info: Info) -> Plan:
    """The ring plan, from the planner; empty where this installation has none."""
    try:
        planner = importlib.import_module("privinf.lowering.plan")
    except ModuleNotFoundError as error:
        if error.name != "privinf.lowering.plan":
            raise
        return {}
    plan: Plan = planner.plan_rings(graph, ranges, info)
    return plan
