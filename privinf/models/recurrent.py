"""What families with a state that does not grow have in common: embedding, blocks with RMSNorm or none, a head, and our own checkpoints.

B batch, T tokens, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from privinf.models.base import Activations, Config, Decoder, Family
from protocols.errors import ConfigError


class RecurrentConfig(Config):
    """What they all have beside the fields of every family."""

    n_inner: int = Field(ge=1, le=10_000_000)
    norm: Literal["rmsnorm", "none"] = "rmsnorm"
    norm_epsilon: float = Field(default=1e-5, gt=0, lt=1)
    tie_word_embeddings: bool = False

    def rms_norm(self, width: int | None = None) -> nn.RMSNorm | None:
        """Of rows of this width, the model's if it is not given; None where the variant has no norms."""
        return nn.RMSNorm(width or self.n_embd, self.norm_epsilon) if self.norm == "rmsnorm" else None


class RecurrentModel(Decoder):
    """Ids (B, T) to logits (B, T, V), through blocks of the family's."""

    config: RecurrentConfig
    block: ClassVar[type[nn.Module]]
    """Of a configuration; x (B, T, d), and a trace or None, to (B, T, d)."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(self.block(config) for _ in range(config.n_layer))
        self.norm_f = config.rms_norm()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def forward(self, ids: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """ids (B, T), 1 <= T <= n_positions -> logits (B, T, V), or (B, V) of the last position. The trace gets the stream once a block."""
        x = self.embeddings(ids)  # (B, T, d)
        if trace is not None:
            trace.residual.append(x)
        for block in self.layers:
            x = block(x, trace)
            if trace is not None:
                trace.residual.append(x)
        if last_only:
            x = x[:, -1]  # (B, d)
        logits: Tensor = self.lm_head(x if self.norm_f is None else self.norm_f(x))
        return logits


class Recurrent(Family):
    """Ours: their configuration is small, and no checkpoint of elsewhere is read."""

    embedding = "embeddings.weight"
    adds_up = True

    def configure(self, fields: Mapping[str, Any], source: str) -> Config:
        if "architectures" in fields or "hidden_size" in fields:
            raise ConfigError(
                f"{source}: model_type: a {self.model_type!r} of elsewhere is not supported",
                remedy=f"train one: --family {self.model_type}",
            )
        return super().configure(fields, source)
