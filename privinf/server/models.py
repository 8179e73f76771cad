"""From what a person names as MODEL to a lowered model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import protocols
from privinf.graph.node import NODE_KINDS
from privinf.graph.private import encode_weights, weights_of
from privinf.lowering.lowered import Lowered
from privinf.lowering.setup import SetupItem, masked
from privinf.models import tokenizer
from privinf.models.checkpoint import weight_files
from privinf.server.budget import Budget, SetUps
from privinf.session.board import Board
from privinf.session.options import Options
from privinf.session.replays import Tapes
from protocols.errors import ConfigError, HandshakeError
from protocols.party import Party

log = logging.getLogger("privinf")
SOURCES = (Path(__file__).parents[1], Path(str(protocols.__file__)).parent)
LIBRARIES = ("torch", "crypten", "numpy", "tokenizers")


def _code(packages: Sequence[Path] = SOURCES) -> bytes:
    """Of every file of these packages, whatever of it lowering imports, and of the libraries that lowering calls."""
    digest = hashlib.sha256(repr([importlib.metadata.version(name) for name in LIBRARIES]).encode())
    for package in packages:
        for path in sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            name, data = path.relative_to(package.parent).as_posix().encode(), path.read_bytes()
            digest.update(b"%d %d " % (len(name), len(data)) + name + data)
    return digest.digest()


def _fingerprint(checkpoint: Path) -> str:
    """Of a checkpoint and of the code that lowers it: a kept lowering never outlives a change of either."""
    digest = hashlib.sha256(_code())
    for place in sorted({inspect.getfile(kind) for kind in NODE_KINDS.values()}):  # operators of other distributions are lowered too
        digest.update(Path(place).read_bytes())
    others = [checkpoint / name for name in (*tokenizer.FILES, "chat_template.jinja", "generation_config.json")]
    for path in (checkpoint / "config.json", *weight_files(checkpoint), *others):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(b"-")
    return digest.hexdigest()


def open_model(path: Path, cache: Path) -> Lowered:
    """A lowered directory, or a checkpoint directory, which is lowered on the way and kept in the cache.

    The kept lowering holds the seed of its weight masks: it lies in the server's own cache, in a directory of mode 0700.
    """
    from privinf.lowering import convert
    from privinf.lowering.storage import is_lowered

    if not path.is_dir():
        what = f"{path} is a file" if path.exists() else f"there is no model directory {path}"
        raise ConfigError(what, remedy="give the directory of a checkpoint or of a lowered model")
    if is_lowered(path):
        return Lowered.load(path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is neither a checkpoint (no config.json) nor a lowered model (no lowered.json)")
    kept = cache / "lowered" / _fingerprint(path)
    if is_lowered(kept):
        try:
            return Lowered.load(kept)
        except ConfigError as error:
            log.warning("a kept lowering is damaged and is made anew: %s", error)
            shutil.rmtree(kept)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{kept.parent} cannot be made: {error.strerror}", remedy="give another --cache") from None
    lowered = convert(path)
    lowered.save(kept)
    return lowered


def masked_sizes(lowered: Lowered) -> dict[str, int]:
    """What set-up sends of each weight where it sends them masked, bytes."""
    return {name: item.size for name, item in lowered.setup.items.items()}


class Loaded:
    """What of a served model is large and never changes: processes that were forked off have it together. ConfigError as `ServedModel`."""

    def __init__(self, lowered: Lowered, device: str) -> None:
        if not lowered.has_weights or lowered.mask_seed is None:
            raise ConfigError("this model came without weights and cannot be served")
        lowered.check_weights()
        self.lowered, self.bundle = lowered, lowered.bundle()
        self.encoded: Mapping[str, Tensor] = encode_weights(lowered.graph, device)


class ServedModel:
    """A model as a server hands it out: its weights encoded once for all sessions, its bundle, and what each client may have of it.

    `sizes` are what set-up sends of each weight, bytes; with a `board` all its processes count together what was sent.
    ConfigError for a model that cannot be served.
    """

    def __init__(
        self,
        model: Lowered | Loaded,
        options: Options,
        *,
        allow_logits: bool = False,
        sizes: Callable[[Lowered], dict[str, int]] = masked_sizes,
        board: Board | None = None,
    ) -> None:
        loaded = model if isinstance(model, Loaded) else Loaded(model, options.device)
        lowered, self.encoded, self.bundle = loaded.lowered, loaded.encoded, loaded.bundle
        assert lowered.mask_seed is not None, "a loaded model has one"
        weights = weights_of(lowered.graph)
        self.lowered, self.mask_seed, self.allow_logits = lowered, lowered.mask_seed, allow_logits
        self.weights = {name: record for name, (record, _, _) in weights.items()}
        self.labels = {name: node.label for name, (_, node, _) in weights.items()}
        whole = len(self.bundle) + sum(sizes(lowered).values())
        what = f"{options.setups} set-ups of this model"
        self.set_ups = SetUps(options.setups * whole, what, options.setup_hours, board=board)
        self.budget = Budget(options.cache, options.budget, options.budget_hours, options.timeout) if options.budget else None
        self.tapes = Tapes()
        self.probe: Callable[[Party], Any] | None = None  # `privinf.local.probe` or `clock`, in local sessions alone

    def masked(self, name: str) -> memoryview:
        """A masked weight, which is what the model's id stands for."""
        data = masked(self.encoded[name], self.mask_seed, self.weights[name])
        if SetupItem.of(data) != self.lowered.setup.items[name]:
            remedy = "lower the checkpoint again with `privinf convert`"
            raise HandshakeError(f"the server's masked {name} is not what its model's id stands for", party="server", remedy=remedy)
        return data
