"""Blocks that run several times, each time with a difference of low rank: relaxed recursive transformers, of the ladder's blocks.

Source: Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", arXiv 2410.20672. A matrix W of a
block is W + A_l B_l in loop l. Privately W is masked and sent once for all loops.

B batch, T tokens, L layers (blocks that a token goes through), K loops, so L / K blocks; d model width, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from privinf.models.aero import Aero, AeroConfig, AeroModel, Projection
from privinf.models.base import Activations, Sharing


class RecursiveConfig(AeroConfig):
    """`n_layer` counts what a token goes through: `loops` times `n_layer` / `loops` blocks. `rank` 0: every loop is the same."""

    model_type: Literal["recursive"]  # type: ignore[assignment]
    loops: int = Field(ge=1, le=10_000)
    rank: int = Field(ge=0, le=65_536)

    @model_validator(mode="after")
    def _loops_fit(self) -> RecursiveConfig:
        if self.n_layer % self.loops:
            raise ValueError(f"loops: {self.n_layer} layers are not {self.loops} times as many blocks")
        if self.rank >= self.n_embd:
            raise ValueError(f"rank: {self.rank} is not below n_embd, {self.n_embd}")
        if self.ffn_scaled:
            raise ValueError("ffn_scaled: a scale of the residual would make each loop's weights others")
        if self.ffn == "identity" or self.ffn_removed:
            raise ValueError("ffn: loops take 'gelu', 'relu' or 'fused', in every block")
        return self

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.n_layer // self.loops

    @property
    def variant(self) -> str:
        """The ladder's name of the block, the loops and the rank: `SM+FuFFN_x3_r8`."""
        return f"{super().variant}_x{self.loops}" + (f"_r{self.rank}" if self.rank else "")


class Difference(nn.Module):
    """Of one matrix in one loop: A B."""

    def __init__(self, of: Projection, rank: int) -> None:
        super().__init__()
        rows, columns = of.weight.shape
        self.down = nn.Parameter(torch.zeros(rows, rank))
        self.up = nn.Parameter(torch.zeros(rank, columns))

    def forward(self) -> Tensor:
        """(in, out)."""
        with torch.autocast("cpu", enabled=False):
            return self.down @ self.up


def _maps(block: nn.Module) -> dict[str, Projection]:
    return {name: part for name, part in block.named_modules() if isinstance(part, Projection)}


class RecursiveModel(AeroModel):
    """A network of the ladder with fewer blocks than layers, and each layer's differences."""

    config: RecursiveConfig

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__(config)
        self.differences = nn.ModuleList(  # of each layer, by the name of the matrix
            nn.ModuleDict({name.replace(".", "_"): Difference(of, config.rank) for name, of in _maps(self.block(layer)).items()})
            for layer in range(config.n_layer if config.rank else 0)
        )

    def block(self, layer: int) -> nn.Module:
        """The one that a layer runs."""
        return self.h[layer % self.config.blocks]

    def weights(self, layer: int) -> dict[str, Tensor]:
        """The matrices of a layer, by their names in its block, where they are not the block's own."""
        if not self.config.rank:
            return {}
        differences = self.differences[layer]
        assert isinstance(differences, nn.ModuleDict)
        return {f"{name}.weight": of.weight + differences[name.replace(".", "_")]() for name, of in _maps(self.block(layer)).items()}

    def through(self, layer: int, x: Tensor, last_only: bool, trace: Activations | None) -> Tensor:
        """By its block, with its own matrices."""
        found: Tensor = functional_call(self.block(layer), self.weights(layer), (x, self.future, last_only, trace))
        return found

    @torch.no_grad()
    def unrolled(self, *, differences: bool = True) -> AeroModel:
        """A network of the ladder with a block for each layer that computes the same, or what it would without its differences."""
        config = self.config
        fields = config.model_dump(exclude={"loops", "rank"}) | {"model_type": "aero"}
        model = AeroModel(AeroConfig.model_validate(fields))
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(("h.", "differences."))}
        for layer in range(config.n_layer):
            own = self.weights(layer) if differences else {}
            state |= {f"h.{layer}.{name}": tensor for name, tensor in (self.block(layer).state_dict() | own).items()}
        model.load_state_dict(state)
        return model.eval()

    def folded(self) -> AeroModel:
        """Unrolled, and told which layers have their weights in common."""
        config = self.config
        runs = tuple(tuple(f"h.{layer}" for layer in range(block, config.n_layer, config.blocks)) for block in range(config.blocks))
        model = self.unrolled().folded()
        model.sharing = Sharing(runs, config.rank, self.unrolled(differences=False).folded())
        return model


class Recursive(Aero):
    """Our own checkpoints, as the ladder's."""

    model_type = "recursive"
    config = RecursiveConfig
    decoder = RecursiveModel
