"""The AERO ladder in one file: GPT-2, and what is left of it without LayerNorm, without nonlinearity in the FFN, without FFN.

Source: Jha and Reagen, "AERO: Softmax-Only LLMs for Efficient Private Inference", arXiv 2410.13060.

B batch, T tokens, L layers, H heads, d model width, d_k = d / H, V vocabulary. Pre-LN decoder, learned positions.
In inference form (`eval()`) every step is a plain operation on visible shapes, so that the exported graph is what one reads here; in
training form the attention uses PyTorch's fused kernel. `folded()` gives the same function without learnable scalars.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from privinf.models.base import Activations, Config, Decoder, Family
from privinf.models.folding import read, take_scalars, write
from protocols.errors import ConfigError

LADDER = ("norm", "ffn", "ffn_scaled", "ffn_removed", "attn_temperature", "attn_row_offset")
"""The fields that GPT-2 does not have."""


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class AeroConfig(Config):
    """One model of the ladder. The last six fields are not GPT-2's; `attn_row_offset` changes no function, but what a softmax needs."""

    model_type: Literal["gpt2", "aero"]
    n_inner: int | None = Field(default=None, ge=1, le=10_000_000)
    layer_norm_epsilon: float = Field(default=1e-5, gt=0, le=1)
    activation_function: Literal["gelu_new", "gelu", "relu"] = "gelu_new"
    norm: Literal["layernorm", "none"] = "layernorm"
    ffn: Literal["gelu", "relu", "identity", "fused"] = "gelu"
    ffn_scaled: bool = False
    ffn_removed: Annotated[tuple[int, ...], BeforeValidator(_list_to_tuple)] = ()
    attn_temperature: bool = False
    attn_row_offset: bool = False

    @field_validator("ffn_removed")
    @classmethod
    def _layers_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a layer is listed twice")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _fields_agree(self) -> AeroConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: {self.n_embd} is not a multiple of n_head, {self.n_head}")
        outside = [layer for layer in self.ffn_removed if not 0 <= layer < self.n_layer]
        if outside:
            raise ValueError(f"ffn_removed: layer {outside[0]} is not one of the layers 0 to {self.n_layer - 1}")
        if self.model_type != "gpt2":  # GPT-2 directories often name an end token beyond a reduced vocabulary: it never comes
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

    @property
    def blocks(self) -> int:
        """How many there are for the layers that a token goes through."""
        return self.n_layer

    def has_ffn(self, layer: int) -> bool:
        """Whether a layer still has its FFN."""
        return layer not in self.ffn_removed

    def to_json(self) -> str:
        """The text of `config.json`: without the fields that this `model_type` does not have."""
        fields = self.model_dump(mode="json", exclude_none=True)
        ours = ("activation_function", *([] if self.attn_row_offset else ["attn_row_offset"]))
        for name in LADDER if self.model_type == "gpt2" else ours:
            fields.pop(name)
        return json.dumps(fields, indent=2) + "\n"


class Projection(nn.Module):
    """An affine map whose matrix is laid (in, out), as GPT-2's are."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out), times a scalar if there is one."""
        if self.training:  # one kernel, and the scalar on the small side
            with torch.autocast("cpu", enabled=False):  # a normalised weight is computed when it is read
                weight: Tensor = self.weight
            if factor is None:
                return F.linear(x, weight.t(), self.bias)
            return F.linear(x, (weight * factor).t(), self.bias * factor)
        y = x @ self.weight + self.bias  # (..., in) @ (in, out) -> (..., out)
        return y if factor is None else y * factor


class Attention(nn.Module):
    """Causal multi-head attention; scores of query i in head h are divided by temperature[h, i] sqrt(d_k).

    With `row_offset` an affine function of x_i is added to them: a softmax does not see it, and may need no maximum then.
    """

    def __init__(self, config: AeroConfig) -> None:
        super().__init__()
        self.n_head, self.head_width = config.n_head, config.head_width
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)
        self.temperature = nn.Parameter(torch.ones(config.n_head, config.n_positions)) if config.attn_temperature else None
        self.inverse_temperature: nn.Parameter | None = None  # (H, n_positions), in a folded model instead of `temperature`
        self.row_offset = Projection(config.n_embd, config.n_head) if config.attn_row_offset else None
        self.scale: float | None = 1 / math.sqrt(self.head_width)  # None once folded into the query weights

    def scaled_queries(self, q: Tensor, start: int, stop: int) -> Tensor:
        """q (B, H, stop - start, d_k) of the positions start..stop-1, divided by temperature and sqrt(d_k)."""
        if self.inverse_temperature is not None:
            return q * self.inverse_temperature[:, start:stop, None]
        if self.temperature is not None:
            return q * (1 / (self.temperature[:, start:stop, None] * math.sqrt(self.head_width))).to(q.dtype)
        return q if self.scale is None else q * self.scale

    def forward(self, x: Tensor, future: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d), or (B, 1, d) for the last position alone; future (n_positions, n_positions), true where j > i."""
        batch, tokens, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)  # 3 times (B, T, d)
        start = tokens - 1 if last_only else 0
        if last_only:
            q = q[:, start:]  # (B, 1, d): nobody reads the other rows of the last layer
        q = q.reshape(batch, tokens - start, self.n_head, self.head_width).transpose(1, 2)  # (B, H, T or 1, d_k)
        k = k.reshape(batch, tokens, self.n_head, self.head_width).transpose(1, 2)  # (B, H, T, d_k)
        v = v.reshape(batch, tokens, self.n_head, self.head_width).transpose(1, 2)  # (B, H, T, d_k)
        q = self.scaled_queries(q, start, tokens)
        plain = self.training and not (trace is not None and trace.keep_attention)  # and then nothing reads the offsets but a trace
        read = None if plain and trace is None else self.row_offset
        offset = None if read is None else read(x[:, start:]).transpose(1, 2)  # (B, H, T or 1)
        if trace is not None:
            trace.queries.append(q)
            trace.keys.append(k)
            trace.offsets += [] if offset is None else [offset]
        if plain:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)  # (B, H, T, d_k)
        else:
            scores = q @ k.transpose(2, 3)  # (B, H, T or 1, T)
            if offset is not None:
                scores = scores + offset.unsqueeze(-1)
            if not last_only:  # the last position sees all
                scores = scores.masked_fill(future[:tokens, :tokens], float("-inf"))
            attention = scores.softmax(dim=-1)  # (B, H, T or 1, T)
            if trace is not None and trace.keep_attention:
                trace.attention.append(attention)
            y = attention @ v  # (B, H, T or 1, d_k)
        y = y.transpose(1, 2).reshape(batch, tokens - start, width)  # (B, T or 1, d)
        out: Tensor = self.c_proj(y)
        return out


class FeedForward(nn.Module):
    """Two matrices with GELU, ReLU or nothing between them, or one fused matrix; alpha and beta scale it and the residual."""

    def __init__(self, config: AeroConfig) -> None:
        super().__init__()
        self.nonlinearity = config.nonlinearity
        self.fused = Projection(config.n_embd, config.n_embd) if config.ffn == "fused" else None
        self.c_fc = Projection(config.n_embd, config.inner_width) if config.ffn != "fused" else None
        self.c_proj = Projection(config.inner_width, config.n_embd) if config.ffn != "fused" else None
        self.alpha = nn.Parameter(torch.ones(())) if config.ffn_scaled else None
        self.beta = nn.Parameter(torch.ones(())) if config.ffn_scaled else None

    @property
    def first(self) -> Projection:
        """The map that reads the residual stream."""
        layer = self.fused if self.fused is not None else self.c_fc
        assert layer is not None
        return layer

    @property
    def last(self) -> Projection:
        """The map that writes to the residual stream."""
        layer = self.fused if self.fused is not None else self.c_proj
        assert layer is not None
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d), without the residual."""
        y = x
        if self.c_fc is not None:
            y = self.c_fc(y)  # (B, T, 4d)
            if self.nonlinearity == "relu":
                y = F.relu(y)
            elif self.nonlinearity is not None:
                y = F.gelu(y, approximate="tanh" if self.nonlinearity == "gelu_tanh" else "none")
        out: Tensor = self.last(y, None if self.alpha is None else 1 / self.alpha)  # (B, T, d)
        return out


class Block(nn.Module):
    """X_sa = X + MHA(LN1(X)); X_out = beta X_sa + (1 / alpha) FFN(LN2(X_sa)), each part where the variant has it."""

    def __init__(self, config: AeroConfig, layer: int) -> None:
        super().__init__()
        normed, has_ffn = config.norm == "layernorm", config.has_ffn(layer)
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon) if normed else None
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon) if normed and has_ffn else None
        self.mlp = FeedForward(config) if has_ffn else None

    def forward(self, x: Tensor, future: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d), or (B, 1, d) for the last position alone."""
        read = x if self.ln_1 is None else self.ln_1(x)
        if last_only:
            x = x[:, -1:]  # (B, 1, d)
        x = x + self.attn(read, future, last_only, trace)
        if trace is not None:
            trace.residual.append(x)
        if self.mlp is None:
            return x
        y = self.mlp(x if self.ln_2 is None else self.ln_2(x))
        x = (x if self.mlp.beta is None else x * self.mlp.beta) + y
        if trace is not None:
            trace.residual.append(x)
        return x


class AeroModel(Decoder):
    """A decoder of the ladder: ids (B, T) to logits (B, T, V). Its weights are zero until `initialise` or `load_checkpoint`."""

    config: AeroConfig
    future: Tensor

    def __init__(self, config: AeroConfig) -> None:
        super().__init__()
        self.config = config
        self.is_folded = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, block) for block in range(config.blocks))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon) if config.norm == "layernorm" else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # (V, d), as GPT-2 lays it
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        for embedding in (self.wte.weight, self.wpe.weight, self.lm_head.weight):
            nn.init.zeros_(embedding)
        self.register_buffer("future", None, persistent=False)
        self.restore()

    def restore(self) -> None:
        """The causal mask, (n_positions, n_positions), true where j > i."""
        self.future = torch.ones(self.config.n_positions, self.config.n_positions, dtype=torch.bool).triu(1)

    def forward(self, ids: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """ids (B, T), 1 <= T <= n_positions -> logits (B, T, V), or (B, V) of the last position: then the last layer computes one row."""
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # (B, T, d)
        if trace is not None:
            trace.residual.append(x)
        for layer in range(self.config.n_layer):
            x = self.through(layer, x, last_only and layer == self.config.n_layer - 1, trace)  # (B, T, d)
        if last_only:
            x = x[:, -1]  # (B, d)
        if self.ln_f is not None:
            x = self.ln_f(x)
        logits: Tensor = self.lm_head(x)  # (B, T, V) or (B, V)
        return logits

    def through(self, layer: int, x: Tensor, last_only: bool, trace: Activations | None) -> Tensor:
        """What a layer makes of x, as `Block.forward`."""
        found: Tensor = self.h[layer](x, self.future, last_only, trace)
        return found

    @torch.no_grad()
    def folded(self) -> AeroModel:
        """The same function without learnable scalars (`privinf.models.folding`): what a private pass runs.

        1 / sqrt(d_k) goes into the query weights, or with the temperature into `inverse_temperature`.
        """
        if self.is_folded:
            return self
        model = copy.deepcopy(self).eval()
        model.is_folded = True
        width, p = self.config.n_embd, 1.0
        for layer, block in enumerate(model.h):
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            read(block.ln_1, [attn.c_attn.weight] + ([] if attn.row_offset is None else [attn.row_offset.weight]), p)
            write(attn.c_proj.weight, attn.c_proj.bias, p)
            if attn.temperature is not None:
                inverse = 1 / (attn.temperature.double() * math.sqrt(attn.head_width))
                attn.inverse_temperature = nn.Parameter(inverse.to(attn.temperature.dtype), requires_grad=False)
                attn.temperature = None
            else:
                attn.c_attn.weight[:, :width].mul_(1 / math.sqrt(attn.head_width))
                attn.c_attn.bias[:width].mul_(1 / math.sqrt(attn.head_width))
            attn.scale = None
            if mlp is None:
                continue
            read(block.ln_2, [mlp.first.weight], p)
            alpha, p = take_scalars(mlp, p, f"h.{layer}.mlp")
            for factor in (alpha, p):
                write(mlp.last.weight, mlp.last.bias, factor)
        if p != 1.0:
            if model.ln_f is None:
                model.lm_head.weight = nn.Parameter(model.lm_head.weight * p, requires_grad=False)  # unties it
            read(model.ln_f, [], p)
        return model


class Aero(Family):
    """Our own checkpoints. A field that looks like one of ours misspelt is refused: ignoring it would build another network."""

    model_type = "aero"
    config: ClassVar[type[AeroConfig]] = AeroConfig
    decoder: ClassVar[type[AeroModel]] = AeroModel
    state = ("keys", "values")
    embedding = "wte.weight"
    prefix = "transformer."
    fixed = MappingProxyType({"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False})

    def configure(self, fields: Mapping[str, Any], source: str) -> AeroConfig:
        ours = set(self.config.model_fields) - {"activation_function"}
        for name in fields:
            close = difflib.get_close_matches(name, ours, n=1, cutoff=0.85) if name not in ours else []
            if close:
                raise ConfigError(f"{source}: {name}: unknown field", remedy=f"did you mean {close[0]}?")
        absent = [name for name in ("norm", "ffn") if name not in fields]
        if absent:
            raise ConfigError(f"{source}: " + "; ".join(f"{name}: missing" for name in absent))
        return self.config.checked({name: value for name, value in fields.items() if name in ours}, source)

    def zero_if_absent(self, name: str) -> bool:
        return name.endswith(".bias") and ".ln_" not in "." + name

    def unread(self, name: str, tensor: Tensor, config: AeroConfig) -> bool:
        """Old files carry the causal mask; LayerNorm variants may keep the ln_2 of a removed FFN."""
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "h" or not parts[1].isdigit() or int(parts[1]) >= config.n_layer:
            return False
        if parts[2] == "attn":
            return parts[3] in ("bias", "masked_bias")
        removed = config.norm == "layernorm" and not config.has_ffn(int(parts[1])) and parts[2] == "ln_2" and parts[3] in ("weight", "bias")
        return removed and tuple(tensor.shape) == (config.n_embd,)

    def fault(self, name: str, tensor: Tensor) -> str:
        positive = name.endswith(("mlp.alpha", "attn.temperature"))
        return "a value is not positive" if positive and not bool((tensor > 0).all()) else ""
