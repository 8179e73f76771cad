"""The server's directory of a lowered model: written whole or not at all, read strictly. No pickle.

`lowered.json` (structure, plan, ranges), `weights.safetensors` (float32), `mask_seed` (the seed of the weight masks: it leaves
this directory to the dealer alone), and `tokenizer.json` if there is one. The directory is 0700, the seed 0600.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.files import check_private, sync
from privinf.lowering.rules import check_graph
from privinf.lowering.schema import Saved, build_graph, decode, lender_of, parameter_key
from protocols.errors import ConfigError

MASK_SEED_BYTES = 32
STRUCTURE, WEIGHTS, SEED, TOKENIZER = "lowered.json", "weights.safetensors", "mask_seed", "tokenizer.json"
FILES = frozenset({STRUCTURE, WEIGHTS, SEED, TOKENIZER})
REMEDY = "lower the checkpoint again with `privinf convert`"


@dataclass(frozen=True, repr=False)
class Stored:
    """What the files of a lowered model hold."""

    saved: Saved
    graph: Graph
    tokenizer: bytes | None
    mask_seed: bytes


def is_lowered(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a lowered model, as opposed to a checkpoint."""
    return (Path(directory) / STRUCTURE).is_file()


def check_target(target: Path) -> None:
    """ConfigError unless a lowered model may be written there: where nothing is yet, or at most another one and nothing beside it."""
    try:
        found = {path.name for path in target.iterdir()} if target.is_dir() else None
    except OSError as error:
        raise ConfigError(f"{target} cannot be read: {error.strerror}", remedy="choose another directory") from None
    if target.exists() and (found is None or (found and not (STRUCTURE in found and found <= FILES))):
        raise ConfigError(f"{target} is there already and holds something else", remedy="choose another directory")


def save_model(model: Stored, directory: str | os.PathLike[str]) -> None:
    """Write to a scratch directory beside the target, then put it in the target's place."""
    target = Path(directory)
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # 0700
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    try:
        write_files(model, scratch)
        sync(scratch)
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, aside)  # onto an empty directory
            os.replace(scratch, target)
            shutil.rmtree(aside)
        else:
            os.replace(scratch, target)
        sync(target.parent)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_files(model: Stored, directory: Path) -> None:
    """Each of the files, on the disk."""
    weights: dict[str, Tensor] = {
        parameter_key(node.name, key): node.value(key).contiguous() for node in model.graph.nodes for key in node.own_parameters
    }
    save_file(weights, directory / WEIGHTS)
    (directory / STRUCTURE).write_bytes(msgspec.json.format(msgspec.json.encode(model.saved), indent=1))
    if model.tokenizer is not None:
        (directory / TOKENIZER).write_bytes(model.tokenizer)
    handle = os.open(directory / SEED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(model.mask_seed)
    for path in directory.iterdir():
        path.chmod(0o600)
        sync(path)


def load_model(directory: str | os.PathLike[str]) -> Stored:
    """Read what `save_model` wrote; ConfigError names the file and what is wrong with it."""
    source = Path(directory)
    if not source.is_dir():
        raise ConfigError(f"{source} is not a directory")
    found = {path.name for path in source.iterdir()}
    missing = {STRUCTURE, WEIGHTS, SEED} - found
    surplus = found - FILES
    if missing:
        raise ConfigError(f"{source}: {', '.join(sorted(missing))} missing", remedy=REMEDY)
    if surplus:
        raise ConfigError(f"{source}: {', '.join(sorted(surplus)[:5])}: not part of a lowered model", remedy="remove it")
    saved = read_structure(source / STRUCTURE)
    weights = read_weights(source / WEIGHTS, saved)
    with naming(source):
        graph = build_graph(saved.graph, weights)
        check_graph(graph, saved.graph.info)
        tokenizer = (source / TOKENIZER).read_bytes() if TOKENIZER in found else None
        return Stored(saved, graph, tokenizer, read_seed(source / SEED))


@contextlib.contextmanager
def naming(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever is wrong with what was read: ConfigError names the directory."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{Path(directory)}: {error}", remedy=REMEDY) from None


def read_structure(path: Path) -> Saved:
    """The graph without its weights; ConfigError for what this release did not write."""
    try:
        return decode(path.read_bytes(), Saved)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", remedy=REMEDY) from None


def read_weights(path: Path, saved: Saved) -> dict[str, Tensor]:
    """The parameters, exactly those of the graph."""
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: truncated, or not a safetensors file: {error}", remedy=REMEDY) from None
    expected = {parameter_key(node.name, key) for node in saved.graph.nodes for key in node.parameters if lender_of(node, key) is None}
    missing, surplus = expected - set(weights), set(weights) - expected
    if missing or surplus:
        faults = [f"{name}: missing" for name in sorted(missing)[:5]] + [f"{name}: surplus" for name in sorted(surplus)[:5]]
        raise ConfigError(f"{path}: {'; '.join(faults)}", remedy=REMEDY)
    return weights


def read_seed(path: Path) -> bytes:
    """The seed of the weight masks, a secret: ConfigError if others may read it."""
    check_private(path, REMEDY)
    seed = path.read_bytes()
    if len(seed) != MASK_SEED_BYTES:
        raise ConfigError(f"{path.name} holds {len(seed)} bytes, expected {MASK_SEED_BYTES}")
    return seed
