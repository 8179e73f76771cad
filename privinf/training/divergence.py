"""Notices a run whose loss is lost, and where in the network its numbers go out of hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from privinf.models.aero import AeroModel
from privinf.models.base import Activations
from privinf.models.llama import LlamaModel
from privinf.models.recurrent import RecurrentModel
from privinf.training.families import Trained
from protocols.errors import PrivinfError

LOST_AFTER, LOST_BY = 50, 1.0  # steps, and nats above the loss of guessing evenly: far beyond what noise does
MOST = 5.0  # nats above it that one step counts for: a few early spikes of a network without a norm are no lost run


class Diverged(PrivinfError):
    """The loss is no longer a number, or stays far above that of guessing."""

    exit_code = 4


class LossWatch:
    """Over the recent loss of a model's run."""

    def __init__(self, model: Trained) -> None:
        self._model = model
        self._smooth: float | None = None

    def check(self, step: int, loss: float, norm: float, ids: Tensor) -> None:
        """Raises Diverged before the weights are touched."""
        guessing = math.log(self._model.config.vocab_size)
        counted = min(loss, guessing + MOST)
        self._smooth = counted if self._smooth is None else 0.9 * self._smooth + 0.1 * counted
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and (step < LOST_AFTER or self._smooth < guessing + LOST_BY):
            return
        what = "" if finite else f", gradient norm {norm:.4g}"
        raise Diverged(
            f"training diverged at step {step}: loss {loss:.4g} (guessing evenly: {guessing:.2f}){what}; {self._why(ids)}",
            remedy="lower --learning-rate, or choose a variant with LayerNorm or a scaled FFN, or --ffn-norm; what was saved is kept",
        )

    @torch.no_grad()
    def _why(self, ids: Tensor) -> str:
        """Where in the network the numbers go out of hand."""
        trace = Activations()
        self._model(ids[:2, :-1], trace=trace)
        sizes = [float(x.abs().max()) for x in trace.residual]
        first = next((index for index, size in enumerate(sizes) if not math.isfinite(size)), None)
        places = ["the embedding"]
        for layer in range(self._model.config.n_layer):
            if isinstance(self._model, RecurrentModel):
                places.append(f"layers.{layer}")
                continue
            has_ffn = self._model.config.has_ffn(layer) if isinstance(self._model, AeroModel) else True
            places += [f"h.{layer}.attn"] + [f"h.{layer}.mlp"] * has_ffn
        grows = f"the residual stream goes from {sizes[0]:.3g} after the embedding to {sizes[-1]:.3g} at the end"
        if first is not None:
            return f"the residual stream is no longer finite after {places[first]}"
        norm = "RMSNorm" if isinstance(self._model, LlamaModel) else "LayerNorm"
        return grows + (f", and no {norm} holds it" if self._model.config.norm == "none" else "")
