"""The server's directory of a lowered model: written whole or not at all, read strictly. No pickle.

`lowered.json` (structure, plan, ranges), `weights.safetensors` (float32), `mask_seed` (the seed of the weight masks: it leaves
this directory to the dealer alone), and `tokenizer.json` if there is one. The directory is 0700, the seed 0600.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from privinf.files import check_private
from privinf.lowering.lowered import MASK_SEED_BYTES, Lowered
from privinf.lowering.rules import check_graph
from privinf.lowering.schema import Saved, build_graph, build_plan, decode, manifest_of, parameter_key
from protocols.errors import ConfigError

STRUCTURE, WEIGHTS, SEED, TOKENIZER = "lowered.json", "weights.safetensors", "mask_seed", "tokenizer.json"
FILES = frozenset({STRUCTURE, WEIGHTS, SEED, TOKENIZER})
REMEDY = "lower the checkpoint again with `privinf convert`"


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


def save_lowered(lowered: Lowered, directory: str | os.PathLike[str]) -> None:
    """Write to a scratch directory beside the target, then put it in the target's place."""
    target = Path(directory)
    if lowered.mask_seed is None or not lowered.has_weights:
        raise ConfigError("this model came as a bundle, without weights: only the server can save it")
    lowered.check_weights()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))  # 0700
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    try:
        write_files(lowered, scratch)
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


def write_files(lowered: Lowered, directory: Path) -> None:
    graph = lowered.graph
    weights: dict[str, Tensor] = {
        parameter_key(node.name, key): node.value(key).contiguous()
        for node in graph.nodes
        for key in node.parameter_shapes
        if not node.tied_to
    }
    save_file(weights, directory / WEIGHTS)
    saved = Saved(manifest_of(graph, lowered.info, lowered.setup), lowered.ranges, lowered.headroom, lowered.sealed, lowered.id)
    (directory / STRUCTURE).write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=1))
    if lowered.tokenizer is not None:
        (directory / TOKENIZER).write_bytes(lowered.tokenizer)
    handle = os.open(directory / SEED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(lowered.mask_seed or b"")
    for path in directory.iterdir():
        path.chmod(0o600)
        sync(path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_lowered(directory: str | os.PathLike[str]) -> Lowered:
    """Read what `save_lowered` wrote; ConfigError names the file and what is wrong with it."""
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
    try:
        graph = build_graph(saved.graph, weights)
        check_graph(graph, saved.graph.info)
        lowered = Lowered(
            graph,
            saved.graph.info,
            plan=build_plan(graph, saved.graph),
            setup=saved.graph.setup,
            ranges=saved.ranges,
            tokenizer=(source / TOKENIZER).read_bytes() if TOKENIZER in found else None,
            mask_seed=read_seed(source / SEED),
            headroom=saved.headroom,
            sealed=saved.weights_sha256,
        )
        lowered.check_weights()
        if lowered.id != saved.id:
            raise ConfigError("what is public of the model is not what was lowered: its id would be another")
        return lowered
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", remedy=REMEDY) from None


def read_structure(path: Path) -> Saved:
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
    expected = {
        parameter_key(node.name, key) for node in saved.graph.nodes if not node.attributes.get("tied_to") for key in node.parameters
    }
    missing, surplus = expected - set(weights), set(weights) - expected
    if missing or surplus:
        faults = [f"{name}: missing" for name in sorted(missing)[:5]] + [f"{name}: surplus" for name in sorted(surplus)[:5]]
        raise ConfigError(f"{path}: {'; '.join(faults)}", remedy=REMEDY)
    return weights


def read_seed(path: Path) -> bytes:
    check_private(path, REMEDY)
    seed = path.read_bytes()
    if len(seed) != MASK_SEED_BYTES:
        raise ConfigError(f"{path.name} holds {len(seed)} bytes, expected {MASK_SEED_BYTES}")
    return seed
