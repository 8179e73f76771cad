"""The JSON forms of a lowered graph, and reading them strictly: they come from a disk or from a peer.

Structure only: a parameter is its name and shape here. Everything is bounded before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from torch import Tensor

import privinf.ops  # noqa: F401  makes the operators known
from privinf.crypten_adapter import Graph
from privinf.graph.info import Info
from privinf.graph.node import NODE_KINDS, lender
from privinf.graph.planning import Plan
from privinf.lowering.rules import MAX_NODES, MAX_RANK
from privinf.lowering.setup import SALT_BYTES, SetUp
from protocols.errors import ConfigError

VERSION = 2  # of the format
MAX_BYTES = 128 * 2**20
HEX = "0123456789abcdef"
MAX_TEMPLATE = 1 << 16

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Size = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Sizes = Annotated[tuple[Size, ...], msgspec.Meta(max_length=MAX_RANK)]


class NodeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node without its weights."""

    name: Name
    op: Name
    layer: Annotated[str, msgspec.Meta(max_length=256)]
    inputs: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=4096)]
    attributes: Annotated[dict[Name, Any], msgspec.Meta(max_length=16)] = {}
    parameters: Annotated[dict[Name, Sizes], msgspec.Meta(max_length=16)] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph without its weights, and its ring plan."""

    info: Info
    inputs: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=64)]
    outputs: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=64)]
    nodes: Annotated[tuple[NodeRecord, ...], msgspec.Meta(min_length=1, max_length=MAX_NODES)]
    setup: SetUp
    plan: Annotated[dict[Name, Annotated[dict[Name, Any], msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=MAX_NODES)]
    format: Literal["privinf-lowered"] = "privinf-lowered"
    version: Literal[2] = 2


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the client gets."""

    graph: Manifest
    tokenizer: bytes | None = None


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`lowered.json` in the server's directory."""

    graph: Manifest
    ranges: dict[str, dict[str, float]]
    headroom: float
    weights_sha256: str  # `Lowered.sealed`
    id: str


class _Graph(msgspec.Struct):
    version: int = VERSION


class _Document(msgspec.Struct):
    """As much of any of them as says whether the rest can be read."""

    graph: _Graph


Document = TypeVar("Document", Bundle, Saved)


def decode(data: bytes, kind: type[Document]) -> Document:
    """Parse and check one of the documents above; ConfigError says where it is wrong."""
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{len(data)} bytes, of at most {MAX_BYTES}")
    try:
        version = msgspec.json.decode(data, type=_Document).graph.version
        if version != VERSION:
            raise ConfigError(f"version {version} of the format, and this release reads version {VERSION}")
        document = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(str(error)) from None
    check_info(document.graph.info)
    check_setup(document.graph.setup)
    return document


def check_info(info: Info) -> None:
    """Bounds of what `Info` says, beside its types."""
    sizes = {"layers": info.layers, "heads": info.heads, "width": info.width, "vocab": info.vocab, "n_positions": info.n_positions}
    for key, size in sizes.items():
        if not 0 <= size <= 10_000_000:
            raise ConfigError(f"info.{key}: {size}")
    if len(info.variant) > 64 or not info.variant.isprintable():
        raise ConfigError("info.variant is no name")
    if len(info.chat_template) > MAX_TEMPLATE:
        raise ConfigError(f"info.chat_template: {len(info.chat_template)} characters, of at most {MAX_TEMPLATE}")
    for token in (*info.eos, *(() if info.bos is None else (info.bos,))):
        if not 0 <= token < 2**31:
            raise ConfigError(f"info: the token {token}")
    if len(info.inputs) > 64 or len(info.eos) > 1024 or len(info.output) > MAX_RANK:
        raise ConfigError("info: too many inputs, end tokens or output axes")


def check_setup(setup: SetUp) -> None:
    """Bounds of what set-up promises, beside its types; a digest becomes a file's name."""
    if len(setup.salt) != SALT_BYTES or len(setup.items) > MAX_NODES * 2:
        raise ConfigError("setup: no salt, or too many items")
    for name, item in setup.items.items():
        if not 1 <= len(name) <= 300 or not 0 <= item.size <= 2**48 or len(item.sha256) != 64 or set(item.sha256) - set(HEX):
            raise ConfigError(f"setup: the item {name[:80]!r} has no name, size or digest")


def manifest_of(graph: Graph, info: Info, setup: SetUp, *, public: bool = False) -> Manifest:
    """What describes a lowered model; `public`: to the client, without what only the server needs."""

    def attributes(node: Any) -> dict[str, Any]:
        return {key: value for key, value in node.attributes().items() if not (public and key in node.server_only)}

    records = tuple(
        NodeRecord(node.name, node.op, node.layer, tuple(inputs), attributes(node), dict(node.parameter_shapes))
        for _, node, inputs in graph.named_nodes()
    )
    plan = {node.name: node.plan.record() for node in graph.nodes}
    return Manifest(info, tuple(graph.input_names), tuple(graph.output_names), records, setup, plan)


def build_plan(graph: Graph, manifest: Manifest) -> dict[str, Plan]:
    """The ring plan, each node's of its own type; ConfigError names what is missing, surplus or out of bounds."""
    surplus = set(manifest.plan) - {node.name for node in graph.nodes}
    if surplus:
        raise ConfigError(f"the ring plan names what is not in the graph: {', '.join(sorted(surplus)[:5])}")
    plans = {}
    for node in graph.nodes:
        try:
            plans[node.name] = msgspec.convert(manifest.plan.get(node.name, {}), node.Plan)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the ring plan: {error}", layer=node.name) from None
    return plans


def parameter_key(node: str, parameter: str) -> str:
    """The name of a parameter in `weights.safetensors`."""
    return f"{node}.{parameter}"


def lender_of(record: NodeRecord, parameter: str) -> str | None:
    """See `privinf.graph.node.lender`."""
    tied, shared = (record.attributes.get(name) for name in ("tied_to", "shared_with"))
    return lender(parameter, tied, shared)


def build_graph(manifest: Manifest, weights: Mapping[str, Tensor]) -> Graph:
    """The graph that a manifest describes, with the parameters that are given and the shapes of the others."""
    graph = Graph(manifest.inputs, manifest.outputs)
    taken = set(manifest.inputs)
    for record in manifest.nodes:
        kind = NODE_KINDS.get(record.op)
        if kind is None:
            raise ConfigError(f"the operator {record.op[:64]!r} is not known", layer=record.name, remedy="the other side may be newer")
        if record.name in taken:
            raise ConfigError("the name is there twice", layer=record.name)
        taken.add(record.name)
        parameters: dict[str, Any] = {}
        for key, shape in record.parameters.items():
            tensor = weights.get(parameter_key(lender_of(record, key) or record.name, key))
            if tensor is not None and record.attributes.get("tied_to") and tensor.dim() == 2:
                tensor = tensor.t()
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ConfigError(f"{key} has shape {list(tensor.shape)}, expected {list(shape)}", layer=record.name)
            parameters[key] = shape if tensor is None else tensor
        graph.append(kind.from_attributes(record.name, record.layer, record.attributes, parameters), record.inputs)
    graph.eval()
    return graph
