"""What training minimises: cross entropy or a teacher's divergence, penalties on values and rows beyond their ranges and on entropies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from privinf.models.base import Activations
from privinf.models.recurrent import RecurrentModel
from privinf.training.entropy import entropy_penalty
from privinf.training.families import Trained
from privinf.training.rows import STRANGE_PART, row_penalty, strange
from privinf.training.settings import Settings
from protocols.errors import ConfigError

HELD_EVERY = 4  # steps between those that have the range penalty, at so many times its weight


class Objective:
    """The loss of a model under its settings; `theta` are the learnable thresholds of the heads' entropies (n_layer, n_head), if any.

    With a `teacher` of the same vocabulary, whose weights stay, the divergence from its next tokens takes the place of the cross entropy.
    """

    def __init__(self, model: Trained, settings: Settings, *, compile: bool, teacher: Trained | None = None) -> None:
        self.model, self.settings = model, settings
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        if isinstance(model, RecurrentModel) and (settings.entropy_lambda > 0 or settings.row_weight > 0):
            raise ConfigError("this family has no rows of scores to penalise", remedy="leave --entropy-lambda and --row-weight out")
        per_head = torch.full((model.config.n_layer, model.config.n_head), settings.entropy_theta)
        self.theta = nn.Parameter(per_head) if settings.entropy_lambda > 0 else None
        self.compute = torch.compile(self.loss) if compile else self.loss

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """All that is learned, by name."""
        return list(self.model.named_parameters()) + ([] if self.theta is None else [("theta", self.theta)])

    def loss(self, ids: Tensor, held: bool = True) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids (B, T + 1) -> (what is minimised, cross entropy in nats per token, what was added to it); `held`: with the range penalty."""
        wants_entropy = self.theta is not None
        rows = held and self.settings.row_weight > 0
        trace = Activations(keep_attention=wants_entropy) if held or wants_entropy else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            logits = self.model(ids[:, :-1], trace=trace)  # (B, T, V)
        logits = logits.float()
        cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        total, added = cross_entropy, {}
        if self.teacher is not None:
            total = added["divergence"] = self._divergence(ids, logits)
        if trace is not None and held and self.settings.limits.weight > 0:
            added["range_penalty"] = HELD_EVERY * self.settings.limits.weight * self._excess(logits, trace)
            drift = logits.logsumexp(dim=-1).square().mean()  # keeps the logits from moving off together
            total = total + added["range_penalty"] + HELD_EVERY * 1e-4 * drift
        if trace is not None and rows:
            added["row_penalty"] = HELD_EVERY * self.settings.row_weight * self._beyond(ids, trace)
            total = total + added["row_penalty"]
        if trace is not None and self.theta is not None:
            penalty = entropy_penalty(trace.attention, self.theta, self.settings.entropy_gamma)
            added["entropy_penalty"] = self.settings.entropy_lambda * penalty
            total = total + added["entropy_penalty"]
        return total, cross_entropy, added

    def _divergence(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Of the model's next tokens from the teacher's, in nats per token: KL(teacher || model), at temperature 1 (Hinton et al. 2015)."""
        assert self.teacher is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            wanted = self.teacher(ids[:, :-1]).float().log_softmax(-1)
        found = logits.log_softmax(-1)
        return nn.functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)

    def _excess(self, logits: Tensor, trace: Activations) -> Tensor:
        """By how much values are beyond the limits, mean of squares."""
        limits, few = self.settings.limits, max(1, len(logits) // 4)  # a quarter of the batch tells enough, at a quarter of the cost
        excess = (logits[:few].abs().amax(dim=-1) - limits.logit).relu().square().mean()
        for x in trace.residual:
            excess = excess + (x[:few].float().abs().amax(dim=-1) - limits.residual).relu().square().mean()
        for q, k in zip(trace.queries, trace.keys, strict=True):
            bound = q[:few].float().norm(dim=-1).amax(dim=-1) * k[:few].float().norm(dim=-1).amax(dim=-1)  # (few, H)
            excess = excess + (bound - limits.score_bound).relu().square().mean()
        return excess

    def _beyond(self, ids: Tensor, trace: Activations) -> Tensor:
        """By how much rows of scores are out of their range: of half the batch, and of two sequences that are no text."""
        other = Activations()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            self.model(strange(ids[:, :-1], self.model.config.vocab_size), trace=other)
        few = max(1, len(trace.queries[0]) // 2)
        return row_penalty(trace, self.settings, few) + STRANGE_PART * row_penalty(other, self.settings)
