"""Checkpoint directories: `config.json`, `model.safetensors` (or its shards), `tokenizer.json`. Strict in, atomic out, never a pickle.

Every tensor of the model must be there, in shape and finite, and nothing else; whatever is wrong is named, all at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from privinf.models.aero import AeroModel
from privinf.models.config import ModelConfig
from privinf.models.tokenizer import TOKENIZER, tokenizer_of
from protocols.errors import ConfigError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files, as Hugging Face writes large ones
SHARD = re.compile(r"[A-Za-z0-9_.\-]{1,128}\.safetensors")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PREFIX = "transformer."
SHOWN_FAULTS = 8


def load_checkpoint(directory: str | Path) -> tuple[AeroModel, ModelConfig, bytes | None]:
    """Reads a checkpoint directory: the model (float32, in inference form), its configuration, and its tokenizer, if it has one, as the
    contents of a `tokenizer.json`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory", remedy="a checkpoint is a directory with config.json and model.safetensors")
    config = ModelConfig.from_file(directory / CONFIG)
    files = weight_files(directory)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise ConfigError(f"{file}: {name}: is in another shard too")
            tensors[name] = tensor
    state = _checked(tensors, config, str(files[0] if len(files) == 1 else directory / INDEX))
    with torch.device("meta"):
        model = AeroModel(config)
    model.load_state_dict(state, assign=True)  # strict
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight
    model.future = torch.ones(config.n_positions, config.n_positions, dtype=torch.bool).triu(1)
    model.requires_grad_(False)
    return model.eval(), config, tokenizer_of(directory)


def save_checkpoint(model: AeroModel, config: ModelConfig, directory: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes `config.json` and `model.safetensors`, each whole or not at all; scalars and temperature in float32, the rest in `dtype`."""
    if model.is_folded:
        raise ConfigError("a folded model is not a checkpoint", remedy="save the model that it was folded from")
    if dtype not in DTYPES:
        raise ConfigError(f"checkpoints hold float32, float16 or bfloat16, not {dtype}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        keep = name.endswith(("alpha", "beta", "temperature"))
        tensors[name] = tensor.detach().to(torch.float32 if keep else dtype).contiguous().clone()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ConfigError(f"{name}: a value is not finite in {dtype}, the checkpoint is not written")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    write_atomically(directory / CONFIG, config.to_json().encode())


def load_tokenizer(data: bytes | Path, config: ModelConfig | None = None) -> Tokenizer:
    """Reads a `tokenizer.json` or its contents; with a configuration, refuses one whose ids the model does not have."""
    path = data if isinstance(data, Path) else TOKENIZER
    try:
        tokenizer = Tokenizer.from_file(str(data)) if isinstance(data, Path) else Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path}: not a tokenizer file: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if config is not None and largest >= config.vocab_size:
        raise ConfigError(f"{path}: has token {largest}, but vocab_size is {config.vocab_size}", remedy="it belongs to another model")
    return tokenizer


# ---- files


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory: one, or the shards that an index names."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index}: not an index of shards", remedy="save the checkpoint again") from None
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise ConfigError(f"{index}: a shard's name is no plain name of a safetensors file")
    return [directory / name for name in sorted(names)]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", remedy="weights are read from one safetensors file, never from a pickle") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{path}: truncated, or not a safetensors file: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The text fields in the header of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: truncated, or not a safetensors file: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    scratch = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), scratch, metadata=dict(metadata))
        _into_place(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    scratch = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        scratch.write_bytes(data)
        _into_place(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _into_place(scratch: Path, path: Path) -> None:
    """Contents to the disk before the name, and the name before we go on."""
    _sync(scratch)
    scratch.chmod(0o644)
    os.replace(scratch, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- checks


def _checked(tensors: Mapping[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """The state that the model wants, in float32, from what the file holds; raises with all that is wrong."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in AeroModel(config).state_dict().items()}
    faults: list[str] = []
    found: dict[str, Tensor | None] = {}
    for name, given in tensors.items():
        plain = name.removeprefix(PREFIX)
        if plain in found:
            faults.append(f"{name}: there twice, with and without the prefix {PREFIX}")
        found[plain] = given
    state: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        tensor: Tensor | None = found.pop(name, None)
        if tensor is None and name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if tensor is None and name.endswith(".bias") and ".ln_" not in "." + name:
            tensor = torch.zeros(shape)
        if tensor is None:
            faults.append(f"{name}: missing")
            continue
        fault = _fault(name, tensor, shape)
        if fault:
            faults.append(fault)
        else:
            state[name] = tensor.to(torch.float32).reshape(shape)
    faults += [f"{name}: surplus, this model has no such tensor" for name, given in found.items() if not _ignored(name, given, config)]
    if config.tie_word_embeddings and "wte.weight" in state:
        head = state.get("lm_head.weight")
        if head is not None and not torch.equal(head, state["wte.weight"]):
            faults.append("lm_head.weight: differs from wte.weight, while tie_word_embeddings is true")
        state["lm_head.weight"] = state["wte.weight"]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ConfigError(f"{source}: " + "; ".join(faults[:SHOWN_FAULTS]) + more)
    return state


def _fault(name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    scalar = shape == () and tuple(tensor.shape) == (1,)
    if tensor.dtype not in DTYPES:
        return f"{name}: dtype {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16 or bfloat16"
    if tuple(tensor.shape) != shape and not scalar:
        return f"{name}: shape {list(tensor.shape)}, expected {list(shape)}"
    if not bool(torch.isfinite(tensor).all()):
        return f"{name}: a value is not finite"
    if name.endswith(("mlp.alpha", "attn.temperature")) and not bool((tensor > 0).all()):
        return f"{name}: a value is not positive"
    return ""


def _ignored(name: str, tensor: Tensor | None, config: ModelConfig) -> bool:
    """Old files carry the causal mask; LayerNorm variants may keep the ln_2 of a removed FFN, which nothing reads."""
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "h" or not parts[1].isdigit() or int(parts[1]) >= config.n_layer:
        return False
    if parts[2] == "attn":
        return parts[3] in ("bias", "masked_bias")
    unread = config.norm == "layernorm" and not config.has_ffn(int(parts[1])) and parts[2] == "ln_2" and parts[3] in ("weight", "bias")
    return unread and tensor is not None and tuple(tensor.shape) == (config.n_embd,)
