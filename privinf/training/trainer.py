"""Trains one variant of the ladder, on a CPU, by seed, resumable, and within what secure fixed point can hold.

AdamW, or Muon for the layers' matrices, with a warmup-stable-decay rate, so that the end can be moved while it runs. With `steps` a
run is a function of its settings, and an interrupted run that is resumed gives the same weights to the last bit. With `minutes` the
clock decides when the rate falls, so such a run does not repeat exactly.

A private pass computes in a ring: values beyond its range wrap around. So the loss has a cheap penalty on what is too large (`Limits`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privinf.models.aero import AeroModel
from privinf.models.checkpoint import read_metadata, read_tensors, save_checkpoint, write_atomically, write_tensors
from privinf.models.recurrent import RecurrentModel
from privinf.models.ttt import TttModel
from privinf.training.corpus import Tokens, batch_at
from privinf.training.divergence import LossWatch
from privinf.training.entropy import bands
from privinf.training.evaluation import entropy_of_heads, evaluate, spread_windows
from privinf.training.families import Trained, TrainedConfig, built, first_weights, with_offsets
from privinf.training.metrics import Metrics, writing
from privinf.training.normalisation import folded_norms, normalise_ffns
from privinf.training.objective import HELD_EVERY, Objective
from privinf.training.optimizers import Optimizers
from privinf.training.recurrent import settle_keys
from privinf.training.rows import fit_offsets, strange
from privinf.training.settings import Settings, rate_at
from protocols.errors import ConfigError

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
STATE, RUN = "state.safetensors", "run.json"
FITTED_ON = 48  # pieces of text, for offsets that a model does not have yet


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


class Trainer:
    """The state of a run in a directory: model, optimiser, step, and the clock so far."""

    def __init__(
        self,
        config: TrainedConfig,
        settings: Settings,
        tokens: Tokens,
        directory: Path,
        corpus_id: str = "",
        compile: bool = False,
        start: Trained | None = None,  # weights to begin with, instead of drawn ones
        teacher: Trained | None = None,  # whose next tokens are learned, instead of the text's
    ) -> None:
        if settings.length > config.n_positions:
            raise ConfigError(f"length: {settings.length} is more than n_positions, {config.n_positions}")
        batch_at(tokens.training, 0, 1, settings.length, settings.seed)  # enough text?
        self.settings, self.tokens = settings, tokens
        self.model = built(with_offsets(config) if settings.row_weight > 0 else config)
        if start is None:
            first_weights(self.model, settings.seed, settings.initial)
            for name, parameter in self.model.named_parameters():
                if name.endswith("temperature"):
                    nn.init.constant_(parameter, settings.temperature)
        else:
            absent = set(self.model.state_dict()) - set(start.state_dict())
            self.model.load_state_dict(start.state_dict(), strict=not absent)
            if absent and isinstance(self.model, AeroModel):  # the offsets, which change no function
                text = [spread_windows(tokens.training, FITTED_ON, settings.length)[:, :-1]]
                middle = (settings.row_low + settings.row_high) / 2
                fit_offsets(self.model, [*text, *(strange(ids, config.vocab_size) for ids in torch.split(text[0], 8))], middle)
        self.started_from = "" if start is None else _fingerprint(start)
        if settings.ffn_norm != "none":
            normalise_ffns(self.model, settings.ffn_norm, settings.seed)
        self.objective = Objective(self.model, settings, compile=compile, teacher=teacher)
        self.optimizers = Optimizers(self.objective.named, settings)
        self.metrics, self.watch = Metrics(directory), LossWatch(self.model)
        self.step, self.elapsed = 0, 0.0
        self.between_steps = True  # else an interrupt hit while weights were changing, and the state is no state of the run
        self.corpus_id = corpus_id

    @property
    def config(self) -> TrainedConfig:
        """The model's."""
        return self.model.config

    @property
    def taught_by(self) -> str:
        """The hash of a teacher's weights; empty where there is none."""
        return "" if self.objective.teacher is None else _fingerprint(self.objective.teacher)

    # ---- one step

    def train_step(self, fraction: float) -> dict[str, float]:
        """One optimiser step on the batch of the current step number."""
        settings = self.settings
        rate = rate_at(settings, self.step, fraction)
        self.model.train()
        ids = torch.from_numpy(batch_at(self.tokens.training, self.step, settings.batch, settings.length, settings.seed))
        held = max(settings.limits.weight, settings.row_weight) > 0 and self.step % HELD_EVERY == 0
        total, cross_entropy, added = self.objective.compute(ids, held)
        norm, loss = self.optimizers.gradients(total, settings.clip), float(cross_entropy.detach())
        self.watch.check(self.step, loss, norm, ids)
        self.between_steps = False
        self.optimizers.step(rate)
        with torch.no_grad():
            for name, parameter in self.optimizers.named:
                if name.endswith(("temperature", "alpha")):
                    parameter.clamp_(min=1e-2)
        if isinstance(self.model, TttModel) and self.step % HELD_EVERY == 0:
            settle_keys(self.model, ids[: max(1, len(ids) // 4), :-1])
        self.step += 1
        self.between_steps = True
        return {"loss": loss, "rate": rate, "gradient_norm": norm} | {name: float(x.detach()) for name, x in added.items()}

    # ---- the whole run

    def run(
        self,
        steps: int | None,
        minutes: float | None,
        report: Callable[[Progress], None] = lambda progress: None,
        save_every_s: float = 180.0,
        validate_every_s: float = 600.0,
        stop_after: int | None = None,
        entropy_every: int | None = None,
        final_windows: int | None = None,
    ) -> dict[str, float]:
        """Trains until `steps` or `minutes` of training time, whichever comes first, counting what earlier calls did.

        What it returns, and records last, is measured on all held-out text, or `final_windows` spread over it; what it reports on the
        way, on a smaller sample.
        `stop_after` interrupts after that many steps of the whole, as if the process had been ended: for tests and for trying things.
        `entropy_every` so many steps, the metrics get the entropy of every head on a sample of the training text.
        """
        if steps is None and minutes is None:
            raise ConfigError("no end is given", remedy="give --steps or --minutes")
        sample = spread_windows(self.tokens.training, 4, self.settings.length)[:, :-1]
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
                self.metrics.record({"step": self.step, "elapsed_s": round(self.elapsed, 1)} | extra)
                rate = rate_at(self.settings, self.step, fraction)
                report(Progress(self.step, fraction, extra["held_out_loss"], rate, recent, self.elapsed, extra))
                validated = time.monotonic()
            if entropy_every and not isinstance(self.model, RecurrentModel) and (ended or self.step % entropy_every == 0):
                self._record_entropy(sample)
            if ended:
                whole = self.validate(final_windows)
                self.metrics.record({"step": self.step, "elapsed_s": round(self.elapsed, 1)} | whole)
                return whole
            before = time.monotonic()
            values = self.train_step(fraction)
            took = time.monotonic() - before
            self.elapsed += took
            speed = self.settings.batch * self.settings.length / took
            recent = speed if recent == 0 else 0.95 * recent + 0.05 * speed
            if self.step % 10 == 0 or self.step == 1:
                self.metrics.record({"step": self.step, "elapsed_s": round(self.elapsed, 1), "tokens_per_s": round(recent)} | values)
            report(Progress(self.step, fraction, values["loss"], values["rate"], recent, self.elapsed))

    def validate(self, windows: int | None = 24) -> dict[str, float]:
        """Loss on the held-out modules, and the largest values that a private pass would have to hold."""
        return evaluate(self.model, self.tokens, self.settings.length, windows)

    # ---- state

    def save(self) -> None:
        """Writes all that a resumed run needs, as one file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.optimizers.named:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            tensors["value." + name] = parameter.detach().clone()
            for kind, value in self.optimizers.state(parameter).items():
                tensors[f"{kind}.{name}"] = value.detach().clone()
        tensors |= {"buffer." + name: buffer.clone() for name, buffer in self._buffers()}
        facts = {
            "step": self.step,
            "elapsed_s": self.elapsed,
            "corpus": self.corpus_id,
            "config": json.loads(self.config.to_json()),
            "settings": self.settings.model_dump(mode="json"),
            "started_from": self.started_from,
            "teacher": self.taught_by,
        }
        with writing(self.metrics.directory / STATE):
            self.metrics.directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self.metrics.directory / STATE, tensors, {"run": json.dumps(facts)})

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The vectors of a spectral norm's power iteration."""
        return [(name, buffer) for name, buffer in self.model.named_buffers() if "parametrizations" in name]

    def resume(self) -> bool:
        """Takes up the state in the directory, if there is one; refuses one of another model, corpus or settings."""
        path = self.metrics.directory / STATE
        if not path.is_file():
            return False
        try:
            facts = json.loads(read_metadata(path)["run"])
            facts["settings"] = Settings().model_dump(mode="json") | facts["settings"]  # some of which earlier releases did not name
            facts.setdefault("teacher", "")
            tensors = read_tensors(path)
            for what, here in (
                ("config", json.loads(self.config.to_json())),
                ("corpus", self.corpus_id),
                ("settings", self.settings.model_dump(mode="json")),
                ("started_from", self.started_from),
                ("teacher", self.taught_by),
            ):
                if facts[what] != here:
                    raise ConfigError(
                        f"{path}: belongs to another run: {what} differs{_difference(facts[what], here)}",
                        remedy="give the same options, or another --output",
                    )
            for name, parameter in self.optimizers.named:
                with torch.no_grad():
                    parameter.copy_(tensors["value." + name])
                kept = self.optimizers.state(parameter)
                kept.update((kind, tensors[f"{kind}.{name}"]) for kind in OPTIMIZER_STATE if f"{kind}.{name}" in tensors)
            for name, buffer in self._buffers():
                buffer.copy_(tensors["buffer." + name])
            self.step, self.elapsed = int(facts["step"]), float(facts["elapsed_s"])
            self.metrics.forget_after(self.step)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path}: not the state of a training run: {error}", remedy="remove it to start anew") from None
        return True

    def export(self, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes the model as a checkpoint directory (the tokenizer is the caller's)."""
        with writing(directory):
            save_checkpoint(folded_norms(self.model), self.config, directory, dtype)

    def _record_entropy(self, sample: Tensor) -> None:
        entropy, e_max = entropy_of_heads(self.model, sample), math.log(max(2, sample.shape[1]))
        rounded = [[round(value, 4) for value in row] for row in entropy.tolist()]
        self.metrics.record({"step": self.step, "entropy": rounded, "entropy_max": round(e_max, 4)} | bands(entropy, e_max))


def _fingerprint(model: Trained) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _difference(there: Any, here: Any) -> str:
    if not isinstance(there, dict) or not isinstance(here, dict):
        return ""
    names = [name for name in sorted(set(there) | set(here)) if there.get(name) != here.get(name)]
    return f" in {', '.join(names)}"


def write_run_file(directory: Path, facts: dict[str, Any]) -> None:
    """Writes what a run is, for whoever resumes it."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / RUN, (json.dumps(facts, indent=2) + "\n").encode())
