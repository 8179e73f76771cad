"""What a model is: the fields of `config.json`, for both `model_type`s, read strictly.

A `gpt2` directory comes from elsewhere, so fields that we do not know are ignored, unless they change the function. An `aero` directory is
ours: a field that looks like one of ours misspelt is refused, because ignoring it would silently build another network.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from protocols.errors import ConfigError

Norm = Literal["layernorm", "none"]
FeedForward = Literal["gelu", "relu", "identity", "fused"]
Activation = Literal["gelu_new", "gelu", "relu"]

# Settings of GPT-2 that change the function, with the only value that we compute.
FIXED_SETTINGS: dict[str, bool] = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "add_cross_attention": False,
}

VARIANT = re.compile(r"SM(?P<t>\(t\))?(?P<ln>\+LN)?(?:\+(?P<ffn>G|R|ScFFN|ScFuFFN|FuFFN|ScG|ScR))?(?:_i(?P<removed>\d+))?")


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class ModelConfig(BaseModel):
    """One model of the ladder. Field names are GPT-2's; the last five exist for `aero` only."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    model_type: Literal["gpt2", "aero"]
    vocab_size: int = Field(ge=1, le=10_000_000)
    n_positions: int = Field(ge=1, le=32_768)
    n_embd: int = Field(ge=1, le=1_000_000)
    n_layer: int = Field(ge=1, le=10_000)
    n_head: int = Field(ge=1, le=100_000)
    n_inner: int | None = Field(default=None, ge=1, le=10_000_000)
    layer_norm_epsilon: float = Field(default=1e-5, gt=0, le=1)
    tie_word_embeddings: bool = True
    bos_token_id: int | None = Field(default=None, ge=0)
    eos_token_id: int | list[int] | None = None
    activation_function: Activation = "gelu_new"
    norm: Norm = "layernorm"
    ffn: FeedForward = "gelu"
    ffn_scaled: bool = False
    ffn_removed: Annotated[tuple[int, ...], BeforeValidator(_list_to_tuple)] = ()
    attn_temperature: bool = False

    @field_validator("ffn_removed")
    @classmethod
    def _layers_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a layer is listed twice")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _fields_agree(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: {self.n_embd} is not a multiple of n_head, {self.n_head}")
        outside = [layer for layer in self.ffn_removed if not 0 <= layer < self.n_layer]
        if outside:
            raise ValueError(f"ffn_removed: layer {outside[0]} is not one of the layers 0 to {self.n_layer - 1}")
        if self.model_type == "aero":  # GPT-2 directories often name an end token beyond a reduced vocabulary: it never comes
            for name in ("bos_token_id", "eos_token_id"):
                value = getattr(self, name)
                for token in value if isinstance(value, list) else [value]:
                    if token is not None and not 0 <= token < self.vocab_size:
                        raise ValueError(f"{name}: {token} is not in the vocabulary of {self.vocab_size}")
        return self

    # ---- what follows from the fields

    @property
    def head_width(self) -> int:
        """d_k, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """The width between the two FFN matrices."""
        return self.n_inner or 4 * self.n_embd

    @property
    def nonlinearity(self) -> Literal["gelu_tanh", "gelu_erf", "relu"] | None:
        """The function between the two FFN matrices, or None where there is none."""
        if self.ffn == "gelu":
            return "gelu_erf" if self.activation_function == "gelu" else "gelu_tanh"
        return "relu" if self.ffn == "relu" else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        if self.eos_token_id is None:
            return frozenset()
        return frozenset(self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id])

    @property
    def variant(self) -> str:
        """The name on the AERO ladder, such as `SM+LN+G`, `SM(t)+ScFuFFN` or `SM+ScFuFFN_i6`."""
        if self.ffn == "fused":
            ffn = "ScFuFFN" if self.ffn_scaled else "FuFFN"
        elif self.ffn == "identity":
            ffn = "ScFFN" if self.ffn_scaled else ""
        else:
            ffn = ("Sc" if self.ffn_scaled else "") + ("G" if self.ffn == "gelu" else "R")
        parts = ["SM(t)" if self.attn_temperature else "SM", "LN" if self.norm == "layernorm" else "", ffn]
        return "+".join(part for part in parts if part) + (f"_i{len(self.ffn_removed)}" if self.ffn_removed else "")

    def has_ffn(self, layer: int) -> bool:
        return layer not in self.ffn_removed

    def to_json(self) -> str:
        """The text of `config.json`."""
        fields = self.model_dump(mode="json", exclude_none=True)
        if self.model_type == "gpt2":
            for name in ("norm", "ffn", "ffn_scaled", "ffn_removed", "attn_temperature"):
                fields.pop(name)
        else:
            fields.pop("activation_function")
        return json.dumps(fields, indent=2) + "\n"

    # ---- where it comes from

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Checks the fields of a `config.json`; every field at fault gets a message that names it."""
        model_type = fields.get("model_type")
        if model_type not in ("gpt2", "aero"):
            raise ConfigError(f"{source}: model_type: {model_type!r} is not supported", remedy="it must be 'gpt2' or 'aero'")
        for name, only in FIXED_SETTINGS.items():
            if name in fields and fields[name] is not only:
                raise ConfigError(
                    f"{source}: {name}: {json.dumps(fields[name], default=str)} changes the function and is not supported",
                    remedy=f"it must be {json.dumps(only)}",
                )
        aero_only = {"norm", "ffn", "ffn_scaled", "ffn_removed", "attn_temperature"}
        ours = set(cls.model_fields) - (aero_only if model_type == "gpt2" else {"activation_function"})
        known = {name: value for name, value in fields.items() if name in ours}
        if model_type == "gpt2":
            activation = known.setdefault("activation_function", "gelu_new")
            known["ffn"] = "relu" if activation == "relu" else "gelu"
        else:
            for name in fields:
                close = difflib.get_close_matches(name, ours, n=1, cutoff=0.85) if name not in ours else []
                if close:
                    raise ConfigError(f"{source}: {name}: unknown field", remedy=f"did you mean {close[0]}?")
            absent = [name for name in ("norm", "ffn") if name not in fields]
            if absent:
                raise ConfigError(f"{source}: " + "; ".join(f"{name}: missing" for name in absent))
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            faults: dict[str, str] = {}
            for fault in error.errors():
                name = str(fault["loc"][0]) if fault["loc"] else ""
                text = "missing" if fault["type"] == "missing" else fault["msg"].removeprefix("Value error, ")
                got = "" if fault["type"] in ("missing", "value_error") else f", not {json.dumps(fault['input'], default=str)[:60]}"
                faults.setdefault(name, f"{name}: {text}{got}" if name else text)
            raise ConfigError(f"{source}: " + "; ".join(faults.values())) from None

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        try:
            fields = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file", remedy="a checkpoint directory holds config.json and model.safetensors") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: a JSON object is expected, not {type(fields).__name__}")
        return cls.from_dict(fields, str(path))

    @classmethod
    def for_variant(cls, variant: str, **sizes: Any) -> ModelConfig:
        """The configuration of a ladder name: `for_variant("SM(t)+ScFuFFN_i2", n_layer=6, n_embd=256, ...)`.

        `_i{k}` removes the FFNs of the k deepest layers.
        """
        match = VARIANT.fullmatch(variant)
        if match is None:
            raise ConfigError(
                f"variant {variant!r} is not on the ladder",
                remedy="examples are SM+LN+G, SM+LN+R, SM+LN, SM+ScFFN, SM+ScFuFFN, SM(t)+ScFuFFN_i2",
            )
        ffn = match["ffn"] or ""
        kind = "fused" if ffn.endswith("FuFFN") else {"G": "gelu", "R": "relu"}.get(ffn[-1:], "identity")
        layers, removed = sizes.get("n_layer", 0), int(match["removed"] or 0)
        if removed > layers:
            raise ConfigError(f"variant {variant!r} removes {removed} FFNs from a model of {layers} layers")
        return cls.from_dict(
            {
                "model_type": "aero",
                "norm": "layernorm" if match["ln"] else "none",
                "ffn": kind,
                "ffn_scaled": ffn.startswith("Sc"),
                "ffn_removed": list(range(layers - removed, layers)),
                "attn_temperature": bool(match["t"]),
                **sizes,
            },
            "variant " + variant,
        )
