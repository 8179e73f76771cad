"""What a family of models is, and how it is found by a checkpoint's `model_type`.

A family is one file of this package, named after its `model_type`: the fields of its `config.json`, its float module, the names of its
tensors, and what its layers keep between tokens. Defining the subclass of `Family` registers it, so that a family may also stand
elsewhere, in a service of its own, say.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from protocols.errors import ConfigError


class Config(BaseModel):
    """The fields that every family's `config.json` has, under GPT-2's names; a family adds its own."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    model_type: str
    vocab_size: int = Field(ge=1, le=10_000_000)
    n_positions: int = Field(ge=1, le=32_768)
    n_embd: int = Field(ge=1, le=1_000_000)
    n_layer: int = Field(ge=1, le=10_000)
    n_head: int = Field(ge=1, le=100_000)
    tie_word_embeddings: bool = True
    bos_token_id: int | None = Field(default=None, ge=0)
    eos_token_id: int | list[int] | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        if self.eos_token_id is None:
            return frozenset()
        return frozenset(self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id])

    @property
    def variant(self) -> str:
        """The name of this member of its family, as tables show it."""
        return self.model_type

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2) + "\n"

    @classmethod
    def checked(cls, fields: Mapping[str, Any], source: str) -> Self:
        """A configuration of exactly these fields; ConfigError names every field at fault."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            faults: dict[str, str] = {}
            for fault in error.errors():
                name = str(fault["loc"][0]) if fault["loc"] else ""
                text = "missing" if fault["type"] == "missing" else fault["msg"].removeprefix("Value error, ")
                got = "" if fault["type"] in ("missing", "value_error") else f", not {json.dumps(fault['input'], default=str)[:60]}"
                faults.setdefault(name, f"{name}: {text}{got}" if name else text)
            raise ConfigError(f"{source}: " + "; ".join(faults.values())) from None


@dataclass(frozen=True)
class Sharing:
    """Of a module in the form that a private pass runs: which of its layers have their weights in common.

    `runs`: the layers' paths, those of one run together; `rank`: of what each linear map of a layer may have besides the common one, at
    most; `plain`: the module as it would be without that.
    """

    runs: tuple[tuple[str, ...], ...]
    rank: int
    plain: Decoder


@dataclass
class Activations:
    """What one forward pass leaves behind for training penalties and analysis; one entry per layer."""

    keep_attention: bool = False  # the (B, H, T, T) matrices: costs the slow path, so only where entropy is wanted
    queries: list[Tensor] = field(default_factory=list)  # (B, H, T, d_k), scaled: queries @ keys^T are the scores
    keys: list[Tensor] = field(default_factory=list)  # (B, H, T, d_k)
    attention: list[Tensor] = field(default_factory=list)  # (B, H, T, T), rows sum to 1
    offsets: list[Tensor] = field(default_factory=list)  # (B, H, T), where the model has them: what is added to a row's scores
    residual: list[Tensor] = field(default_factory=list)  # (B, T, d): after the embedding, each attention and each FFN


class Decoder(nn.Module):
    """Base of the families' float modules: ids (B, T), 1 <= T <= n_positions, to logits (B, T, V)."""

    config: Config
    sharing: Sharing | None = None
    is_folded: bool = False  # whether it is in the form that `folded` gives

    def folded(self) -> Decoder:
        """The same function in the form that a private pass runs."""
        return self

    def restore(self) -> None:
        """Makes anew, after its weights were loaded, what is no weight (a buffer that no checkpoint holds)."""


class Family:
    """One family; a subclass with a `model_type` registers itself."""

    model_type: ClassVar[str] = ""
    config: ClassVar[type[Config]] = Config
    decoder: ClassVar[type[Decoder]] = Decoder
    """The float module, made of a configuration."""
    state: ClassVar[tuple[str, ...]] = ()
    """What each layer keeps between tokens, under the names by which nodes of the lowered graph declare it."""
    adds_up: ClassVar[bool] = False
    """Whether what a token adds stays, so that the same one again and again may come to more than any text: calibration sees that too."""
    embedding: ClassVar[str] = ""
    """The tensor that `lm_head.weight` is where a configuration ties them; without it a head is never tied."""
    prefix: ClassVar[str] = ""
    """What checkpoints may have in front of every tensor's name."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Settings that change the function, with the only value that we compute."""
    registry: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.model_type:
            Family.registry[cls.model_type] = cls

    def configure(self, fields: Mapping[str, Any], source: str) -> Config:
        """The configuration that these fields of a `config.json` say; ConfigError names every field at fault, and `source`."""
        return self.config.checked(fields, source)

    def build(self, config: Config) -> Decoder:
        """The float module, without the weights of any checkpoint."""
        return self.decoder(config)

    def zero_if_absent(self, name: str) -> bool:
        """Whether a checkpoint may leave this tensor out: it is zero then."""
        return False

    def unread(self, name: str, tensor: Tensor, config: Any) -> bool:
        """Whether a checkpoint may hold this tensor, which the model does not have, because nothing reads it."""
        return False

    def fault(self, name: str, tensor: Tensor) -> str:
        """What is wrong with the values of a tensor that is finite and has its shape; empty if nothing is."""
        return ""

    def tables(self, config: Any) -> Mapping[str, str]:
        """Tensors that are another one, by the name of that one; a checkpoint may leave them out, or hold an equal one."""
        return {"lm_head.weight": self.embedding} if self.embedding and config.tie_word_embeddings else {}


def families() -> dict[str, type[Family]]:
    """All families by `model_type`: those of this package, and those defined elsewhere."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(Family.registry)


def family_of(fields: Mapping[str, Any], source: str = "config.json") -> Family:
    """The family that the `model_type` of a `config.json` names; ConfigError for one that is not known."""
    known, model_type = families(), fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        listed = " or ".join(repr(name) for name in sorted(known, reverse=True))
        raise ConfigError(f"{source}: model_type: {model_type!r} is not supported", remedy=f"it must be {listed}")
    return known[model_type]()


def configure(fields: Mapping[str, Any], source: str = "config.json") -> Config:
    """The configuration that the fields of a `config.json` say, by the family that they name; ConfigError as there."""
    return _configured(family_of(fields, source), fields, source)


def _configured(family: Family, fields: Mapping[str, Any], source: str) -> Config:
    for name, only in family.fixed.items():
        if name in fields and fields[name] is not only:
            raise ConfigError(
                f"{source}: {name}: {json.dumps(fields[name], default=str)} changes the function and is not supported",
                remedy=f"it must be {json.dumps(only)}",
            )
    return family.configure(fields, source)


def read_config(path: Path) -> tuple[Family, Config]:
    """A `config.json`; ConfigError where it cannot be read, names no family, or has a field at fault."""
    try:
        fields = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", remedy="a checkpoint directory holds config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: a JSON object is expected, not {type(fields).__name__}")
    family = family_of(fields, str(path))
    return family, _configured(family, fields, str(path))
