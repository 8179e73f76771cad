"""The optimisers of a run: AdamW, and Muon for the layers' matrices where the settings say so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from privinf.training.settings import Settings


class Optimizers:
    """Over named parameters, each in one of them."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], settings: Settings) -> None:
        self.named = named
        lengths = "original0" if settings.ffn_norm == "weight" else "temperature"  # of a normalised weight: not to be pulled to zero
        free = [p for name, p in named if p.dim() != 2 or name.endswith(("temperature", "theta", lengths, "row_offset.weight"))]
        layers = [p for name, p in named if p.dim() == 2 and name.startswith(("h.", "model.layers.")) and not _in(p, free)]
        matrices = layers if settings.optimizer == "muon" else []
        decayed = [p for _, p in named if not _in(p, free) and not _in(p, matrices)]
        self._each: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}],
                lr=settings.learning_rate,
                betas=(0.9, 0.95),
                eps=1e-8,
                fused=True,
            )
        ]
        if matrices:  # https://kellerjordan.github.io/posts/muon; at AdamW's rates, as in arXiv 2502.16982
            rate, decay = settings.learning_rate, settings.weight_decay
            self._each.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    def gradients(self, total: Tensor, clip: float) -> float:
        """Those of a loss, cut to a norm of `clip`; the norm before."""
        for optimizer in self._each:
            optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        return float(nn.utils.clip_grad_norm_([p for _, p in self.named], clip))

    def step(self, rate: float) -> None:
        """One step at this rate."""
        for optimizer in self._each:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a parameter."""
        mine = next(o for o in self._each if any(_in(parameter, group["params"]) for group in o.param_groups))
        found: dict[str, Tensor] = mine.state[parameter]
        return found


def _in(parameter: Tensor, among: Sequence[Tensor]) -> bool:
    """Whether it is one of them; tensors compare by value."""
    return any(parameter is other for other in among)
