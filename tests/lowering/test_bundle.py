"""A lowered model on its way to the client: what is in its public bundle, what must not be, and bad peers."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from privinf.graph.private import encode_weights, weights_of
from privinf.lowering import Lowered, convert, load, lower
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import save_checkpoint
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from protocols.errors import ConfigError, HandshakeError, PrivinfError
from protocols.ring import pack
from tests.support import trio as t
from tests.support.lowering_modules import Blocks, Temperature
from tests.support.two_party import mask_weight

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def test_bundle_round_trip(lowered: Lowered) -> None:
    data = lowered.bundle()
    client = Lowered.from_bundle(data)
    assert (client.info, client.plan, client.tokenizer) == (lowered.info, lowered.plan, lowered.tokenizer)
    assert not client.has_weights and client.mask_seed is None and client.ranges == {}
    assert client.bundle() == data
    for node, twin in zip(lowered.graph.nodes, client.graph.nodes, strict=True):
        assert (node.name, node.layer, node.attributes(), node.parameter_shapes, node.plan) == (
            twin.name,
            twin.layer,
            twin.attributes(),
            twin.parameter_shapes,
            twin.plan,
        )
    with pytest.raises(PrivinfError, match="without weights"):
        client.graph(IDS)
    with pytest.raises(ConfigError, match="only the server"):
        client.save("anywhere")


@pytest.mark.parametrize("module", [Temperature, Blocks])
def test_bundle_of_a_module(module: Any) -> None:
    x = torch.randn(1, 5, 8)
    lowered = lower(module(), x)
    client = Lowered.from_bundle(lowered.bundle())
    assert client.info == lowered.info and [node.op for node in client.graph.nodes] == [node.op for node in lowered.graph.nodes]


def test_bundle_holds_no_weight_no_range_and_no_seed(lowered: Lowered) -> None:
    data = lowered.bundle()
    assert lowered.mask_seed is not None
    assert lowered.mask_seed not in data and lowered.mask_seed.hex().encode() not in data and b"ranges" not in data
    for node in lowered.graph.nodes:
        for key in node.parameter_shapes:
            for value in node.value(key).reshape(-1)[:50].tolist():
                if value != 0:
                    assert struct.pack("<f", value) not in data, node
                    assert f"{value:.6g}".encode() not in data, node


def test_digests_and_id_are_of_masked_weights_that_are_fresh_for_each_lowering(lowered: Lowered, saved: Path) -> None:
    """They say nothing of the weights: under another seed, or with another salt, everything is another."""
    weights, encoded = weights_of(lowered.graph), encode_weights(lowered.graph)
    assert lowered.mask_seed is not None and set(lowered.setup.items) == set(weights)
    for name, (weight, _, _) in weights.items():
        item, plain = lowered.setup.items[name], pack(encoded[name], weight.bits)
        sent = pack(mask_weight(encoded[name], lowered.mask_seed, weight), weight.bits)
        assert (item.size, item.sha256) == (sent.size, hashlib.sha256(sent).hexdigest()) != (sent.size, hashlib.sha256(plain).hexdigest())
    assert lowered.id == hashlib.sha256(lowered.bundle()).hexdigest() == load(saved).id

    def lowered_again(**fields: Any) -> Lowered:
        kept = {"plan": lowered.plan, "tokenizer": lowered.tokenizer, "mask_seed": lowered.mask_seed, **fields}
        return Lowered(lowered.graph, lowered.info, **kept)

    other, salted = lowered_again(mask_seed=secrets.token_bytes(32)), lowered_again()
    digests = [{item.sha256 for item in model.setup.items.values()} for model in (lowered, other, salted)]
    assert not digests[0] & digests[1] and digests[0] == digests[2]
    assert len({lowered.id, other.id, salted.id}) == 3 and salted.setup.salt != lowered.setup.salt
    for model in (other, salted):
        documents = [json.loads(each.bundle()) for each in (model, lowered)]
        assert [document["graph"].pop("setup") for document in documents] and documents[0] == documents[1]  # all that differs


def test_two_conversions_of_one_checkpoint_have_nothing_in_common_but_what_is_public(tmp_path: Path) -> None:
    first, second = (convert(t.checkpoint()) for _ in range(2))
    assert first.id != second.id and first.setup.salt != second.setup.salt
    assert not {item.sha256 for item in first.setup.items.values()} & {item.sha256 for item in second.setup.items.values()}


def test_bundle_does_not_depend_on_the_weights() -> None:
    """Two models of one architecture: the same bundle, but for the id and the ring plan."""

    def structure(scale: float) -> Any:
        torch.manual_seed(int(scale * 10))
        module = Blocks()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(scale)
        document = json.loads(lower(module, torch.randn(1, 5, 8)).bundle())
        del document["graph"]["plan"], document["graph"]["setup"]
        return document

    assert structure(1.0) == structure(0.3)


def test_bundle_does_not_depend_on_folded_scalars(tmp_path: Path) -> None:
    """A LayerNorm's epsilon takes up the betas when a checkpoint is folded; the client could compute them from it."""

    def structure(beta: float) -> Any:
        config = ladder_config("SM+LN+ScG", vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=4)
        model = AeroModel(config)
        initialise(model, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("beta"):
                    parameter.fill_(beta)
        directory = tmp_path / str(beta)
        save_checkpoint(model, config, directory)
        made = convert(directory)
        made.save(directory / "lowered")
        for server in (made, load(directory / "lowered")):
            (last,) = [node for node in server.graph.nodes if node.name == "ln_f.layer_norm"]
            assert last.epsilon == pytest.approx(1e-5 / beta**4)
        document = json.loads(made.bundle())
        del document["graph"]["plan"], document["graph"]["setup"]
        return document

    assert structure(0.75) == structure(0.6)


class Numbers(torch.nn.Module):
    """Numbers that are taken out of parameters, as Python has them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(round(scale * 10))
        self.linear, self.factor = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.tensor(scale))
        self.register_buffer("count", torch.tensor(round(scale * 10)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.linear(x)) * self.factor.item() + 3 * self.factor.item()
        y = torch.relu(y * self.count.item()) / self.linear.weight.norm().item()
        return y


def test_bundle_holds_no_number_that_was_taken_out_of_a_parameter() -> None:
    def structure(scale: float) -> Any:
        document = json.loads(lower(Numbers(scale), torch.randn(3, 4)).bundle())
        del document["graph"]["plan"], document["graph"]["setup"]
        return document

    assert structure(0.7) == structure(0.3)


def change(data: bytes, path: str, value: Any) -> bytes:
    """A bundle with the entry at `a.0.b` replaced."""
    document = json.loads(data)
    *way, last = path.split(".")
    place: Any = document
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[int(last) if isinstance(place, list) else last] = value
    return msgspec.json.encode(document)


BAD_ENTRIES: list[tuple[str, Any]] = [
    ("graph.format", "other"),
    ("graph.version", 1),
    ("graph.info.id", "0" * 32),
    ("graph.setup.salt", "c2hvcnQ="),
    ("graph.setup.items", {"": {"size": 1, "sha256": "0" * 64}}),
    ("graph.setup.items", {"x": {"size": 2**60, "sha256": "0" * 64}}),
    ("graph.setup.items", {"x": {"size": 1, "sha256": "../" * 21 + "0"}}),
    ("graph.setup.items", {"x": {"size": 1}}),
    ("graph.info.layers", -1),
    ("graph.info.vocab", 41),
    ("graph.info.n_positions", 13),
    ("graph.info.output", [1, 39]),
    ("graph.info.variant", "x" * 100),
    ("graph.info.inputs", []),
    ("graph.nodes", []),
    ("graph.nodes.0.op", "attention"),
    ("graph.nodes.0.name", "ids"),
    ("graph.nodes.0.name", "a/../b"),
    ("graph.nodes.0.layer", "\x1b[2J"),
    ("graph.nodes.0.parameters.weight", [40, 2**41]),
    ("graph.nodes.0.parameters.weight", [40]),
    ("graph.nodes.0.parameters.weight", [0, 16]),
    ("graph.nodes.0.parameters", {}),
    ("graph.nodes.0.parameters", {"weight": [40, 16], "name": [1]}),
    ("graph.nodes.0.attributes", {"name": "x"}),
    ("graph.nodes.2.inputs", ["position_bias", "position_bias"]),
    ("graph.nodes.3.attributes.heads", 10**30),
    ("graph.nodes.3.attributes.heads", "4"),
    ("graph.nodes.3.attributes.scale", 1e999),
    ("graph.nodes.3.attributes", {"heads": 4}),
    ("graph.outputs", ["nowhere"]),
    ("graph.outputs", ["h.0.add", "h.1.add"]),
    ("graph.plan.position_bias", {"bits": 1e30}),
    ("graph.plan.position_bias", {"bits": "x" * 1000}),
    ("graph.plan.position_bias", [1]),
    ("graph.plan.position_bias", {"bits": 40}),  # a key is missing
    ("graph.plan.position_bias", {"bits": 40, "frac": 14, "ring": 40}),  # one is another operator's
    ("graph.plan.position_bias", {"bits": 65, "frac": 14}),
    ("graph.plan", {}),
    ("tokenizer", "not base64!"),
    ("tokenizer", 3),
]


@pytest.mark.parametrize(("path", "value"), BAD_ENTRIES)
def test_a_bundle_from_a_bad_peer_is_refused(path: str, value: Any, lowered: Lowered) -> None:
    with pytest.raises(HandshakeError, match="bundle"):
        Lowered.from_bundle(change(lowered.bundle(), path, value))


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"graph":' * 5000])
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(HandshakeError):
        Lowered.from_bundle(data)


def test_a_doubling_graph_is_refused() -> None:
    """Forty nodes that each double their input would make a client allocate a terabyte."""
    lowered = lower(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    document = json.loads(lowered.bundle())
    first = document["graph"]["nodes"][0]["name"]
    names = [first, *(f"cat{i}" for i in range(40))]
    document["graph"]["nodes"] += [
        {"name": name, "op": "cat", "layer": "", "inputs": [before] * 2, "attributes": {"dim": 0}, "parameters": {}}
        for before, name in itertools.pairwise(names)
    ]
    document["graph"]["outputs"] = [names[-1]]
    document["graph"]["info"]["output"] = [2**40, 2]
    with pytest.raises(HandshakeError, match="has shape"):
        Lowered.from_bundle(msgspec.json.encode(document))
