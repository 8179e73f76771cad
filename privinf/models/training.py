"""Trains one variant of the ladder, on a CPU, by seed, resumable, and within what secure fixed point can hold.

AdamW with a warmup-stable-decay rate, so that the end can be moved while it runs. With `steps` a run is a function of its settings, and an
interrupted run that is resumed gives the same weights to the last bit. With `minutes` the clock decides when the rate falls, so such a run
does not repeat exactly.

A private pass computes in a ring: values beyond its range wrap around. So the loss has a cheap penalty on what is too large (`Limits`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from privinf.models.aero import AeroModel, Trace, initialise
from privinf.models.checkpoint import read_metadata, read_tensors, save_checkpoint, write_atomically, write_tensors
from privinf.models.config import ModelConfig
from privinf.models.corpus import Tokens, batch_at
from privinf.models.entropy import entropy_penalty
from protocols.errors import ConfigError, PrivinfError

STATE, METRICS, RUN = "state.safetensors", "metrics.jsonl", "run.json"


class Limits(BaseModel):
    """Where the penalty starts. The bound on scores is |q_i| max_j |k_j|, so it holds for every pair, seen or not."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    score_bound: float = 32.0
    residual: float = 24.0
    logit: float = 32.0
    weight: float = 1e-2


class Settings(BaseModel):
    """All that a run depends on besides the model's configuration and the corpus."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = Field(default=1, ge=0)
    batch: int = Field(default=16, ge=1)
    length: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=200, ge=0)
    decay_fraction: float = Field(default=0.4, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    bf16: bool = True
    entropy_lambda: float = Field(default=0.0, ge=0)
    entropy_gamma: float = Field(default=0.2, ge=0, le=1)
    limits: Limits = Limits()

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """Settings, or a ConfigError that names every value at fault."""
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, not {fault['input']}" for fault in error.errors()]
            raise ConfigError("training settings: " + "; ".join(faults)) from None


class Diverged(PrivinfError):
    """The loss is no longer a number."""

    exit_code = 4


@dataclass
class Progress:
    """What a run reports after a step. Losses in nats per token."""

    step: int
    fraction: float  # of the whole run, by steps or by the clock
    loss: float
    rate: float
    tokens_per_second: float
    elapsed_s: float
    extra: dict[str, float] = field(default_factory=dict)


def rate_at(settings: Settings, step: int, fraction: float) -> float:
    """Warmup by steps, then level, then linearly to zero over the last `decay_fraction` of the run."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    left = (1 - fraction) / settings.decay_fraction if settings.decay_fraction > 0 else 1.0
    return settings.learning_rate * warm * min(1.0, max(0.0, left))


class Trainer:
    """The state of a run in a directory: model, optimiser, step, and the clock so far."""

    def __init__(
        self, config: ModelConfig, settings: Settings, tokens: Tokens, directory: Path, corpus_id: str = "", compile: bool = False
    ) -> None:
        if settings.length > config.n_positions:
            raise ConfigError(f"length: {settings.length} is more than n_positions, {config.n_positions}")
        batch_at(tokens.training, 0, 1, settings.length, settings.seed)  # enough text?
        self.config, self.settings, self.tokens, self.directory = config, settings, tokens, directory
        self.model = AeroModel(config)
        initialise(self.model, settings.seed)
        per_head = torch.full((config.n_layer, config.n_head), 0.5)  # theta, learnable, only with entropy regularisation
        self.theta = nn.Parameter(per_head) if settings.entropy_lambda > 0 else None
        decayed = [p for name, p in self.model.named_parameters() if p.dim() == 2 and not name.endswith("temperature")]
        free = [p for name, p in self.model.named_parameters() if p.dim() != 2 or name.endswith("temperature")]
        free += [] if self.theta is None else [self.theta]
        self.named = [(name, p) for name, p in self.model.named_parameters()] + ([] if self.theta is None else [("theta", self.theta)])
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        self.step, self.elapsed = 0, 0.0
        self.between_steps = True  # else an interrupt hit while weights were changing, and the state is no state of the run
        self.corpus_id = corpus_id
        self.compiled_loss = torch.compile(self.loss) if compile else self.loss

    # ---- one step

    def loss(self, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids (B, T + 1) -> (what is minimised, cross entropy in nats per token, what was added to it)."""
        trace = Trace(keep_attention=self.theta is not None)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            logits = self.model(ids[:, :-1], trace=trace)  # (B, T, V)
        logits = logits.float()
        log_z = logits.logsumexp(dim=-1)  # (B, T)
        chosen = logits.gather(2, ids[:, 1:, None])[:, :, 0]  # (B, T)
        cross_entropy = (log_z - chosen).mean()
        limits, few = self.settings.limits, max(1, len(ids) // 4)  # a quarter of the batch tells enough, at a quarter of the cost
        excess = (logits[:few].abs().amax(dim=-1) - limits.logit).relu().square().mean()
        for x in trace.residual:
            excess = excess + (x[:few].float().abs().amax(dim=-1) - limits.residual).relu().square().mean()
        for q, k in zip(trace.queries, trace.keys, strict=True):
            bound = q[:few].float().norm(dim=-1).amax(dim=-1) * k[:few].float().norm(dim=-1).amax(dim=-1)  # (few, H)
            excess = excess + (bound - limits.score_bound).relu().square().mean()
        added = {"range_penalty": limits.weight * excess}
        if self.theta is not None:
            penalty = entropy_penalty(trace.attention, self.theta, self.settings.entropy_gamma)
            added["entropy_penalty"] = self.settings.entropy_lambda * penalty
        drift = 1e-4 * log_z.square().mean()  # keeps the logits from moving off together
        total = cross_entropy + sum(added.values()) + drift
        return total, cross_entropy, added

    def train_step(self, fraction: float) -> dict[str, float]:
        """One optimiser step on the batch of the current step number."""
        settings = self.settings
        rate = rate_at(settings, self.step, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        ids = torch.from_numpy(batch_at(self.tokens.training, self.step, settings.batch, settings.length, settings.seed))
        total, cross_entropy, added = self.compiled_loss(ids)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_([p for _, p in self.named], settings.clip)
        loss = float(cross_entropy.detach())
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise Diverged(
                f"training diverged at step {self.step}: loss {loss:.4g}, gradient norm {float(norm):.4g}",
                remedy="lower --learning-rate, or choose a variant with LayerNorm or a scaled FFN",
            )
        self.between_steps = False
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.named:
                if name.endswith(("temperature", "alpha")):
                    parameter.clamp_(min=1e-2)
        self.step += 1
        self.between_steps = True
        return {"loss": loss, "rate": rate, "gradient_norm": float(norm)} | {name: float(x.detach()) for name, x in added.items()}

    # ---- the whole run

    def run(
        self,
        steps: int | None,
        minutes: float | None,
        report: Callable[[Progress], None] = lambda progress: None,
        save_every_s: float = 180.0,
        validate_every_s: float = 600.0,
        stop_after: int | None = None,
    ) -> dict[str, float]:
        """Trains until `steps` or `minutes` of training time, whichever comes first, counting what earlier calls did.

        What it returns, and records last, is measured on all held-out text; what it reports on the way, on a sample of it.
        `stop_after` interrupts after that many steps of the whole, as if the process had been ended: for tests and for trying things.
        """
        if steps is None and minutes is None:
            raise ConfigError("no end is given", remedy="give --steps or --minutes")
        saved = validated = time.monotonic()
        recent = 0.0
        while True:
            fraction = max(self.step / steps if steps else 0.0, self.elapsed / (60 * minutes) if minutes else 0.0)
            ended = fraction >= 1 or (stop_after is not None and self.step >= stop_after)
            now = time.monotonic()
            if ended or now - saved > save_every_s:
                self.save()
                saved = time.monotonic()
            if ended or now - validated > validate_every_s:
                extra = self.validate()
                self._record({"step": self.step, "elapsed_s": round(self.elapsed, 1)} | extra)
                rate = rate_at(self.settings, self.step, fraction)
                report(Progress(self.step, fraction, extra["held_out_loss"], rate, recent, self.elapsed, extra))
                validated = time.monotonic()
            if ended:
                whole = self.validate(None)
                self._record({"step": self.step, "elapsed_s": round(self.elapsed, 1)} | whole)
                return whole
            before = time.monotonic()
            values = self.train_step(fraction)
            took = time.monotonic() - before
            self.elapsed += took
            speed = self.settings.batch * self.settings.length / took
            recent = speed if recent == 0 else 0.95 * recent + 0.05 * speed
            if self.step % 10 == 0 or self.step == 1:
                self._record({"step": self.step, "elapsed_s": round(self.elapsed, 1), "tokens_per_s": round(recent)} | values)
            report(Progress(self.step, fraction, values["loss"], values["rate"], recent, self.elapsed))

    def validate(self, windows: int | None = 24) -> dict[str, float]:
        """Loss on the held-out modules, and the largest values that a private pass would have to hold."""
        return evaluate(self.model, self.tokens, self.settings.length, windows)

    # ---- state

    def save(self) -> None:
        """Writes all that a resumed run needs, as one file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            tensors["value." + name] = parameter.detach().clone()
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}.{name}"] = value.detach().clone()
        facts = {
            "step": self.step,
            "elapsed_s": self.elapsed,
            "corpus": self.corpus_id,
            "config": json.loads(self.config.to_json()),
            "settings": self.settings.model_dump(mode="json"),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        write_tensors(self.directory / STATE, tensors, {"run": json.dumps(facts)})

    def resume(self) -> bool:
        """Takes up the state in the directory, if there is one; refuses one of another model, corpus or settings."""
        path = self.directory / STATE
        if not path.is_file():
            return False
        try:
            facts = json.loads(read_metadata(path)["run"])
            tensors = read_tensors(path)
            for what, here in (
                ("config", json.loads(self.config.to_json())),
                ("corpus", self.corpus_id),
                ("settings", self.settings.model_dump(mode="json")),
            ):
                if facts[what] != here:
                    raise ConfigError(
                        f"{path}: belongs to another run: {what} differs{_difference(facts[what], here)}",
                        remedy="give the same options, or another --output",
                    )
            for name, parameter in self.named:
                with torch.no_grad():
                    parameter.copy_(tensors["value." + name])
                state = {kind: tensors[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in tensors}
                if state:
                    self.optimizer.state[parameter] = state
            self.step, self.elapsed = int(facts["step"]), float(facts["elapsed_s"])
            self._forget_after(self.step)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path}: not the state of a training run: {error}", remedy="remove it to start anew") from None
        return True

    def export(self, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes the model as a checkpoint directory (the tokenizer is the caller's)."""
        save_checkpoint(self.model, self.config, directory, dtype)

    def _record(self, values: dict[str, float]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _forget_after(self, step: int) -> None:
        """Takes out of the metrics what will now be done again."""
        path = self.directory / METRICS
        if path.is_file():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())


def _difference(there: Any, here: Any) -> str:
    if not isinstance(there, dict) or not isinstance(here, dict):
        return ""
    names = [name for name in sorted(set(there) | set(here)) if there.get(name) != here.get(name)]
    return f" in {', '.join(names)}"


@torch.no_grad()
def evaluate(model: AeroModel, tokens: Tokens, length: int, windows: int | None = None) -> dict[str, float]:
    """Held-out loss over consecutive windows of `length` tokens (all, or the first `windows` spread evenly), and the largest values met."""
    stream = tokens.held_out
    model.eval()
    starts = list(range(0, max(1, len(stream) - length - 1), length))
    if windows is not None and len(starts) > windows:
        starts = [starts[index * len(starts) // windows] for index in range(windows)]
    total, count = 0.0, 0
    largest = {"score": 0.0, "residual": 0.0, "logit": 0.0}
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for ids in _windows(stream, starts, length):
        trace = Trace()
        logits = model(ids[:, :-1], trace=trace)  # (B, T, V)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
        largest["logit"] = max(largest["logit"], float(logits.abs().max()))
        largest["residual"] = max([largest["residual"], *(float(x.abs().max()) for x in trace.residual)])
        for q, k in zip(trace.queries, trace.keys, strict=True):
            scores = (q @ k.transpose(2, 3)).masked_fill(future[: ids.shape[1] - 1, : ids.shape[1] - 1], 0.0)
            largest["score"] = max(largest["score"], float(scores.abs().max()))
    loss_per_token = total / count
    result = {
        "held_out_loss": loss_per_token,
        "held_out_perplexity": math.exp(min(loss_per_token, 50)),
        "bits_per_byte": loss_per_token / math.log(2) * (len(stream) - 1) / tokens.held_out_bytes,
        "held_out_tokens": float(count),
    }
    return result | {f"max_{name}": value for name, value in largest.items()}


def _windows(stream: NDArray[np.uint16], starts: list[int], length: int) -> Iterator[Tensor]:
    for first in range(0, len(starts), 8):
        rows = [stream[start : start + length + 1] for start in starts[first : first + 8]]
        for size in sorted({len(row) for row in rows}, reverse=True):  # the last window may be shorter
            yield torch.from_numpy(np.stack([row for row in rows if len(row) == size]).astype(np.int64))


@torch.no_grad()
def continue_text(model: AeroModel, ids: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation of a prompt, up to an end token, `new_tokens` or the last position."""
    model.eval()
    out = list(ids)
    for _ in range(min(new_tokens, model.config.n_positions - len(ids) + 1)):
        out.append(int(model(torch.tensor([out]), last_only=True)[0].argmax()))
        if out[-1] in model.config.stop_ids:
            break
    return out[len(ids) :]


def write_run_file(directory: Path, facts: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / RUN, (json.dumps(facts, indent=2) + "\n").encode())
