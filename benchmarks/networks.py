"""The networks that are measured: a MODEL directory, or a network of the ladder with random weights, lowered."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from privinf.lowering import Lowered, convert
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import save_checkpoint
from privinf.server.models import open_model
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from protocols.errors import ConfigError

LARGEST_SCORE = 30.0  # CrypTen's approximation of the exponential is out of its depth beyond
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 256}
SHIPPED = {"n_layer": 6, "n_head": 8, "n_embd": 256, "vocab_size": 3072, "n_positions": 256}
QUICK = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 512, "n_positions": 64}


@dataclass(frozen=True)
class Network:
    """A lowered network and its directory, which the processes of the backends read."""

    lowered: Lowered
    directory: Path
    weights: str  # where they are from

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of a row."""
        info = self.lowered.info
        return {"variant": info.variant, "layers": info.layers, "heads": info.heads, "width": info.width}

    @property
    def parameters(self) -> int:
        """Elements of all parameters, a tied one once."""
        nodes = self.lowered.graph.nodes
        shapes = [node.parameter_shapes[key] for node in nodes for key in node.own_parameters]
        return sum(int(torch.Size(shape).numel()) for shape in shapes)

    @property
    def largest_score(self) -> float:
        """The largest attention score on the calibration inputs."""
        return max((entry.get("score_seen", 0.0) for entry in self.lowered.ranges.values()), default=0.0)

    def ids(self, seq: int, index: int = 0) -> list[int]:
        """`seq` tokens: windows of this repository's own text where there is a tokenizer, else from a fixed seed."""
        info = self.lowered.info
        if not 1 <= seq <= info.n_positions:
            raise ConfigError(f"{seq} tokens do not fit the model's context of {info.n_positions}")
        if self.lowered.tokenizer is not None:
            from tokenizers import Tokenizer

            text = "\n".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
            found = Tokenizer.from_buffer(self.lowered.tokenizer).encode(text).ids
            start = index * seq % max(1, len(found) - seq)
            if len(found) >= seq:
                return list(found[start : start + seq])
        generator = torch.Generator().manual_seed(4711 + index)
        return [int(number) for number in torch.randint(info.vocab, (seq,), generator=generator)]

    def floats(self, ids: list[int]) -> torch.Tensor:
        """The last position's logits in float, (V,)."""
        with torch.no_grad():
            out: torch.Tensor = self.lowered.graph(torch.tensor([ids]))
        return out.double().reshape(-1)


def model_id(model: Path) -> str:
    """Of what a MODEL directory computes: its configuration, weights and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def count(variant: str, **sizes: Any) -> int:
    """Parameters of a network of the ladder, before it is made."""
    with torch.device("meta"):
        return sum(p.numel() for p in AeroModel(ladder_config(variant, **sizes)).parameters())


def opened(model: Path, work: Path) -> Network:
    """A MODEL directory; a checkpoint is lowered into the working directory."""
    lowered = open_model(model, work)
    directory = work / "model"
    lowered.save(directory)
    return Network(lowered, directory, "trained")


def made(variant: str, work: Path, *, seed: int = 1, **sizes: Any) -> Network:
    """A network with random weights; ConfigError if its scores are out of proportion, UnsupportedOpError if it does not lower yet."""
    config = ladder_config(variant, **sizes)
    name = variant.replace("(", "").replace(")", "").replace("+", "-")
    model = AeroModel(config)
    with torch.no_grad():
        initialise(model, seed)
    save_checkpoint(model, config, work / f"{name}.checkpoint")
    del model
    lowered = convert(work / f"{name}.checkpoint")
    shutil.rmtree(work / f"{name}.checkpoint")  # at GPT-2 size half a gigabyte
    lowered.save(work / name)
    network = Network(lowered, work / name, f"random, seed {seed}")
    if network.largest_score > LARGEST_SCORE:
        raise ConfigError(f"{variant}: random weights gave attention scores of {network.largest_score:.0f}", remedy="choose another seed")
    return network
