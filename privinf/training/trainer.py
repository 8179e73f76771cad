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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from privinf.models.aero import Activations, AeroConfig, AeroModel
from privinf.models.checkpoint import read_metadata, read_tensors, save_checkpoint, write_atomically, write_tensors
from privinf.training.corpus import Tokens, batch_at
from privinf.training.entropy import bands, entropy_penalty
from privinf.training.evaluation import entropy_of_heads, evaluate, spread_windows
from privinf.training.initial import initialise
from privinf.training.normalisation import folded_norms, normalise_ffns
from privinf.training.settings import Settings, rate_at
from protocols.errors import ConfigError, PrivinfError

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
STATE, METRICS, RUN = "state.safetensors", "metrics.jsonl", "run.json"
HELD_EVERY = 4  # steps between those that have the range penalty, at so many times its weight
LOST_AFTER, LOST_BY = 50, 1.0  # steps, and nats above the loss of guessing evenly: far beyond what noise does


class Diverged(PrivinfError):
    """The loss is no longer a number, or stays far above that of guessing."""

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


class Trainer:
    """The state of a run in a directory: model, optimiser, step, and the clock so far."""

    def __init__(
        self,
        config: AeroConfig,
        settings: Settings,
        tokens: Tokens,
        directory: Path,
        corpus_id: str = "",
        compile: bool = False,
        start: AeroModel | None = None,  # weights to begin with, instead of drawn ones
    ) -> None:
        if settings.length > config.n_positions:
            raise ConfigError(f"length: {settings.length} is more than n_positions, {config.n_positions}")
        batch_at(tokens.training, 0, 1, settings.length, settings.seed)  # enough text?
        self.config, self.settings, self.tokens, self.directory = config, settings, tokens, directory
        self.model = AeroModel(config)
        if start is None:
            initialise(self.model, settings.seed, settings.initial)
            for name, parameter in self.model.named_parameters():
                if name.endswith("temperature"):
                    nn.init.constant_(parameter, settings.temperature)
        else:
            self.model.load_state_dict(start.state_dict())
        self.started_from = "" if start is None else _fingerprint(start)
        if settings.ffn_norm != "none":
            normalise_ffns(self.model, settings.ffn_norm, settings.seed)
        per_head = torch.full((config.n_layer, config.n_head), settings.entropy_theta)  # learnable
        self.theta = nn.Parameter(per_head) if settings.entropy_lambda > 0 else None
        self.named = list(self.model.named_parameters()) + ([] if self.theta is None else [("theta", self.theta)])
        lengths = "original0" if settings.ffn_norm == "weight" else "temperature"  # of a normalised weight: not to be pulled to zero
        free = [p for name, p in self.named if p.dim() != 2 or name.endswith(("temperature", "theta", lengths))]
        layers = [p for name, p in self.named if p.dim() == 2 and name.startswith("h.") and not _in(p, free)]
        matrices = layers if settings.optimizer == "muon" else []
        decayed = [p for _, p in self.named if not _in(p, free) and not _in(p, matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
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
            self.optimizers.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        self.step, self.elapsed = 0, 0.0
        self.between_steps = True  # else an interrupt hit while weights were changing, and the state is no state of the run
        self.corpus_id = corpus_id
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # told what goes into the metrics
        self.smooth: float | None = None  # the recent loss, for noticing divergence
        self.compiled_loss = torch.compile(self.loss) if compile else self.loss

    # ---- one step

    def loss(self, ids: Tensor, held: bool = True) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids (B, T + 1) -> (what is minimised, cross entropy in nats per token, what was added to it); `held`: with the range penalty."""
        wants_entropy = self.theta is not None
        trace = Activations(keep_attention=wants_entropy) if held or wants_entropy else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            logits = self.model(ids[:, :-1], trace=trace)  # (B, T, V)
        logits = logits.float()
        cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        total, added = cross_entropy, {}
        if trace is not None and held:
            added["range_penalty"] = HELD_EVERY * self.settings.limits.weight * self._excess(logits, trace)
            drift = logits.logsumexp(dim=-1).square().mean()  # keeps the logits from moving off together
            total = total + added["range_penalty"] + HELD_EVERY * 1e-4 * drift
        if trace is not None and self.theta is not None:
            penalty = entropy_penalty(trace.attention, self.theta, self.settings.entropy_gamma)
            added["entropy_penalty"] = self.settings.entropy_lambda * penalty
            total = total + added["entropy_penalty"]
        return total, cross_entropy, added

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

    def train_step(self, fraction: float) -> dict[str, float]:
        """One optimiser step on the batch of the current step number."""
        settings = self.settings
        rate = rate_at(settings, self.step, fraction)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.model.train()
        ids = torch.from_numpy(batch_at(self.tokens.training, self.step, settings.batch, settings.length, settings.seed))
        total, cross_entropy, added = self.compiled_loss(ids, settings.limits.weight > 0 and self.step % HELD_EVERY == 0)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_([p for _, p in self.named], settings.clip)
        loss = float(cross_entropy.detach())
        self._check(loss, float(norm), ids)
        self.between_steps = False
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, parameter in self.named:
                if name.endswith(("temperature", "alpha")):
                    parameter.clamp_(min=1e-2)
        self.step += 1
        self.between_steps = True
        return {"loss": loss, "rate": rate, "gradient_norm": float(norm)} | {name: float(x.detach()) for name, x in added.items()}

    def _check(self, loss: float, norm: float, ids: Tensor) -> None:
        """Raises Diverged before the weights are touched."""
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        guessing = math.log(self.config.vocab_size)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and (self.step < LOST_AFTER or self.smooth < guessing + LOST_BY):
            return
        what = "" if finite else f", gradient norm {norm:.4g}"
        raise Diverged(
            f"training diverged at step {self.step}: loss {loss:.4g} (guessing evenly: {guessing:.2f}){what}; {self._why(ids)}",
            remedy="lower --learning-rate, or choose a variant with LayerNorm or a scaled FFN, or --ffn-norm; what was saved is kept",
        )

    @torch.no_grad()
    def _why(self, ids: Tensor) -> str:
        """Where in the network the numbers go out of hand."""
        trace = Activations()
        self.model(ids[:2, :-1], trace=trace)
        sizes = [float(x.abs().max()) for x in trace.residual]
        first = next((index for index, size in enumerate(sizes) if not math.isfinite(size)), None)
        places = ["the embedding"]
        for layer in range(self.config.n_layer):
            places += [f"h.{layer}.attn"] + [f"h.{layer}.mlp"] * self.config.has_ffn(layer)
        grows = f"the residual stream goes from {sizes[0]:.3g} after the embedding to {sizes[-1]:.3g} at the end"
        if first is not None:
            return f"the residual stream is no longer finite after {places[first]}"
        return grows + ("" if self.config.norm == "layernorm" else ", and no LayerNorm holds it")

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
                self._record({"step": self.step, "elapsed_s": round(self.elapsed, 1)} | extra)
                rate = rate_at(self.settings, self.step, fraction)
                report(Progress(self.step, fraction, extra["held_out_loss"], rate, recent, self.elapsed, extra))
                validated = time.monotonic()
            if entropy_every and (ended or self.step % entropy_every == 0):
                self._record_entropy(sample)
            if ended:
                whole = self.validate(final_windows)
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
            for kind, value in self._state(parameter).items():
                tensors[f"{kind}.{name}"] = value.detach().clone()
        tensors |= {"buffer." + name: buffer.clone() for name, buffer in self._buffers()}
        facts = {
            "step": self.step,
            "elapsed_s": self.elapsed,
            "corpus": self.corpus_id,
            "config": json.loads(self.config.to_json()),
            "settings": self.settings.model_dump(mode="json"),
            "started_from": self.started_from,
        }
        with _writing(self.directory / STATE):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self.directory / STATE, tensors, {"run": json.dumps(facts)})

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What its optimiser keeps of a parameter."""
        mine = next(o for o in self.optimizers if any(_in(parameter, group["params"]) for group in o.param_groups))
        found: dict[str, Tensor] = mine.state[parameter]
        return found

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The vectors of a spectral norm's power iteration."""
        return [(name, buffer) for name, buffer in self.model.named_buffers() if "parametrizations" in name]

    def resume(self) -> bool:
        """Takes up the state in the directory, if there is one; refuses one of another model, corpus or settings."""
        path = self.directory / STATE
        if not path.is_file():
            return False
        try:
            facts = json.loads(read_metadata(path)["run"])
            facts["settings"] = {"optimizer": "adamw"} | facts["settings"]  # which earlier releases did not name
            tensors = read_tensors(path)
            for what, here in (
                ("config", json.loads(self.config.to_json())),
                ("corpus", self.corpus_id),
                ("settings", self.settings.model_dump(mode="json")),
                ("started_from", self.started_from),
            ):
                if facts[what] != here:
                    raise ConfigError(
                        f"{path}: belongs to another run: {what} differs{_difference(facts[what], here)}",
                        remedy="give the same options, or another --output",
                    )
            for name, parameter in self.named:
                with torch.no_grad():
                    parameter.copy_(tensors["value." + name])
                self._state(parameter).update((kind, tensors[f"{kind}.{name}"]) for kind in OPTIMIZER_STATE if f"{kind}.{name}" in tensors)
            for name, buffer in self._buffers():
                buffer.copy_(tensors["buffer." + name])
            self.step, self.elapsed = int(facts["step"]), float(facts["elapsed_s"])
            self._forget_after(self.step)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path}: not the state of a training run: {error}", remedy="remove it to start anew") from None
        return True

    def export(self, directory: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes the model as a checkpoint directory (the tokenizer is the caller's)."""
        with _writing(directory):
            save_checkpoint(folded_norms(self.model), self.config, directory, dtype)

    def _record(self, values: dict[str, Any]) -> None:
        with _writing(self.directory / METRICS):
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        for listener in self.listeners:
            listener(values)

    def _record_entropy(self, sample: Tensor) -> None:
        entropy, e_max = entropy_of_heads(self.model, sample), math.log(max(2, sample.shape[1]))
        rounded = [[round(value, 4) for value in row] for row in entropy.tolist()]
        self._record({"step": self.step, "entropy": rounded, "entropy_max": round(e_max, 4)} | bands(entropy, e_max))

    def _forget_after(self, step: int) -> None:
        """Takes out of the metrics what will now be done again."""
        path = self.directory / METRICS
        if path.is_file():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())


def _in(parameter: Tensor, among: Sequence[Tensor]) -> bool:
    """Whether it is one of them; tensors compare by value."""
    return any(parameter is other for other in among)


def _fingerprint(model: AeroModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says which file could not be written; files are replaced whole, so that the one before is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be written: {reason}", remedy="what was saved before is kept; make room, then resume") from None


def _difference(there: Any, here: Any) -> str:
    if not isinstance(there, dict) or not isinstance(here, dict):
        return ""
    names = [name for name in sorted(set(there) | set(here)) if there.get(name) != here.get(name)]
    return f" in {', '.join(names)}"


def write_run_file(directory: Path, facts: dict[str, Any]) -> None:
    """Writes what a run is, for whoever resumes it."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / RUN, (json.dumps(facts, indent=2) + "\n").encode())
