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
from torch import Tensor, nn

from privinf.files import sync
from privinf.models.base import Config, Decoder, Family, families, read_config
from privinf.models.tokenizer import TOKENIZER, tokenizer_of
from protocols.errors import ConfigError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files, as Hugging Face writes large ones
SHARD = re.compile(r"[A-Za-z0-9_.\-]{1,128}\.safetensors")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHOWN_FAULTS = 8


def load_checkpoint(directory: str | Path) -> tuple[Decoder, Config, bytes | None]:
    """Reads a checkpoint directory: the model (float32, in inference form), its configuration, and its tokenizer.

    That is the contents of a `tokenizer.json`, or None.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory", remedy="a checkpoint is a directory with config.json and model.safetensors")
    family, config = read_config(directory / CONFIG)
    files = weight_files(directory)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise ConfigError(f"{file}: {name}: is in another shard too")
            tensors[name] = tensor
    state = _checked(tensors, family, config, str(files[0] if len(files) == 1 else directory / INDEX))
    with torch.device("meta"):
        model = family.build(config)
    model.load_state_dict(state, assign=True)  # strict
    for name, table in family.tables(config).items():
        _assign(model, name, model.get_parameter(table))
    model.restore()
    model.requires_grad_(False)
    return model.eval(), config, tokenizer_of(directory)


def _assign(model: Decoder, name: str, parameter: nn.Parameter) -> None:
    """Lets a module read another's parameter as its own."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


def save_checkpoint(model: Decoder, config: Config, directory: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes `config.json` and `model.safetensors`, each whole or not at all; scalars and temperature in float32, the rest in `dtype`."""
    if model.is_folded:
        raise ConfigError("a folded model is not a checkpoint", remedy="save the model that it was folded from")
    if dtype not in DTYPES:
        raise ConfigError(f"checkpoints hold float32, float16 or bfloat16, not {dtype}")
    tables = families()[config.model_type]().tables(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in tables:
            continue
        keep = name.endswith(("alpha", "beta", "temperature"))
        tensors[name] = tensor.detach().to(torch.float32 if keep else dtype).contiguous().clone()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ConfigError(f"{name}: a value is not finite in {dtype}, the checkpoint is not written")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    write_atomically(directory / CONFIG, config.to_json().encode())


def load_tokenizer(data: bytes | Path, config: Config | None = None) -> Tokenizer:
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
    sync(scratch)
    scratch.chmod(0o644)
    os.replace(scratch, path)
    sync(path.parent)


# ---- checks


def _checked(tensors: Mapping[str, Tensor], family: Family, config: Config, source: str) -> dict[str, Tensor]:
    """The state that the model wants, in float32, from what the file holds; raises with all that is wrong."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in family.build(config).state_dict().items()}
    tables = family.tables(config)
    faults: list[str] = []
    found: dict[str, Tensor] = {}
    for name, given in tensors.items():
        plain = name.removeprefix(family.prefix)
        if plain in found:
            faults.append(f"{name}: there twice, with and without the prefix {family.prefix}")
        found[plain] = given
    state: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        tensor = found.pop(name, None)
        if tensor is None and name in tables:
            continue
        if tensor is None and family.zero_if_absent(name):
            tensor = torch.zeros(shape)
        if tensor is None:
            faults.append(f"{name}: missing")
            continue
        fault = _fault(family, name, tensor, shape)
        if fault:
            faults.append(f"{name}: {fault}")
        else:
            state[name] = tensor.to(torch.float32).reshape(shape)
    faults += [f"{name}: surplus, this model has no such tensor" for name, given in found.items() if not family.unread(name, given, config)]
    for name, table in tables.items():
        if table in state:
            if name in state and not torch.equal(state[name], state[table]):
                faults.append(f"{name}: differs from {table}, while tie_word_embeddings is true")
            state[name] = state[table]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ConfigError(f"{source}: " + "; ".join(faults[:SHOWN_FAULTS]) + more)
    return state


def _fault(family: Family, name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    scalar = shape == () and tuple(tensor.shape) == (1,)
    if tensor.dtype not in DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16 or bfloat16"
    if tuple(tensor.shape) != shape and not scalar:
        return f"shape {list(tensor.shape)}, expected {list(shape)}"
    if not bool(torch.isfinite(tensor).all()):
        return "a value is not finite"
    return family.fault(name, tensor)
