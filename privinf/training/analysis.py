"""What `privinf analyze` finds: entropy, what each FFN is worth, causal traces, and which FFNs to remove."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from privinf.models.aero import AeroModel
from privinf.models.checkpoint import write_atomically
from privinf.models.tokenizer import TOKENIZER
from privinf.training.corpus import END, Document, Tokens, encode_corpus
from privinf.training.entropy import bands
from privinf.training.evaluation import entropy_of_heads, evaluate, spread_windows, token_loss
from privinf.training.removal import deepest, ffn_layers, least, loss_without, recommend, without_ffns
from privinf.training.settings import Settings
from privinf.training.tracing import PLACES, SPAN, choose_prompts, trace_prompts
from privinf.training.trainer import Progress, Trainer
from protocols.errors import ConfigError

HELD_OUT_WINDOWS, CANDIDATES = 64, 16
Told = Callable[[str, float], None]


def text_for(model: AeroModel, tokenizer: Tokenizer | None, documents: list[Document] | None, wanted: int | None) -> tuple[Tokens, str]:
    """The corpus in the model's tokens, about `wanted` of them for training (None: all), and what it is; random ids without a tokenizer."""
    if tokenizer is None or documents is None:
        generator = np.random.default_rng(1)
        training, held_out = (generator.integers(0, min(65536, model.config.vocab_size), 1 << 16).astype(np.uint16) for _ in range(2))
        return Tokens(training, held_out, len(held_out)), "random token ids, for there is no tokenizer: the losses mean nothing"
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= min(65536, model.config.vocab_size):
        raise ConfigError(f"token {largest} of the tokenizer is beyond the vocabulary", remedy="at most 65536 tokens can be analysed")
    end = tokenizer.token_to_id(END)
    if end is None:
        end = min(model.config.stop_ids, default=0)
    if wanted is not None:
        taken = [document for document in documents if not document.held_out]
        stride = max(1, sum(len(document.text) for document in taken) // (12 * wanted))  # more than enough characters for a token
        documents = taken[::stride] + [document for document in documents if document.held_out]
    return encode_corpus(documents, tokenizer, end), "the corpus"


def analyze_model(
    model: AeroModel, tokens: Tokens, *, windows: int, length: int, prompts: int, prompt_length: int, seed: int, told: Told
) -> dict[str, Any]:
    """Everything but the removal; ids of the training part of the text alone."""
    config, folded = model.config, model.folded()
    ids = spread_windows(tokens.training, windows, length)  # (N, T + 1)
    seen = ids.shape[1] - 1
    e_max = math.log(max(2, seen))
    told("entropy", 0.0)
    heads = entropy_of_heads(folded, ids[:, :-1])
    told("ablation", 0.0)
    base = token_loss(folded, ids)
    ablation = []
    for done, layer in enumerate(ffn_layers(config)):
        loss = loss_without(folded, ids, [layer])
        ablation.append({"layer": layer, "loss": loss, "increase": loss - base})
        told("ablation", (done + 1) / len(ffn_layers(config)))
    tracing: dict[str, Any] | None = None
    traced: dict[str, dict[str, tuple[float, float]]] | None = None
    if prompts:
        chosen = choose_prompts(folded, spread_windows(tokens.training, CANDIDATES * prompts, prompt_length), prompts)
        effects = trace_prompts(folded, chosen, seed, told=lambda done: told("tracing", done))
        tracing = dataclasses.asdict(effects) | {"places": list(PLACES), "span": SPAN, "prompt_length": chosen.shape[1] - 1}
        traced = {name: {str(layer): of_kind["FFN"][layer] for layer in ffn_layers(config)} for name, of_kind in effects.whole.items()}
    return {
        "model": {
            "variant": config.variant,
            "layers": config.n_layer,
            "heads": config.n_head,
            "width": config.n_embd,
            "vocab": config.vocab_size,
            "ffn_removed": list(config.ffn_removed),
        },
        "text": {"windows": len(ids), "length": seen},
        "entropy": {"max": e_max, "even": math.lgamma(seen + 1) / seen, "heads": heads.tolist()} | bands(heads, e_max),
        "ffn": {"loss": base, "ablation": ablation, "traced": traced},
        "tracing": tracing,
        "removal": None,
    }


def analyze_removal(
    model: AeroModel,
    tokens: Tokens,
    count: int,
    *,
    windows: int,
    length: int,
    settings: Settings,
    steps: int,
    output: Path,
    tokenizer: bytes | None,
    told: Told,
    traced: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> dict[str, Any]:
    """The recommendation beside AERO's rule at the same `count`, and beside what was `traced`: `least_probability`, `least_entropy`.

    With `steps` all again after so much training each, saved in `output`.
    """
    config, folded = model.config, model.folded()
    ids = spread_windows(tokens.training, windows, length)
    rules = {"recommended": recommend(folded, ids, count, partial(told, "choosing")), "deepest": deepest(config, count)}
    for effect, by_layer in (traced or {}).items():
        rules["least_" + effect] = least({int(layer): mean for layer, (mean, _) in by_layer.items()}, count)
    found: dict[str, Any] = {
        "remove": count,
        "trained_steps": steps,
        "held_out_loss": evaluate(folded, tokens, length, HELD_OUT_WINDOWS)["held_out_loss"],
    }
    done: dict[tuple[int, ...], dict[str, Any]] = {}
    for name, layers in rules.items():
        if layers not in done:
            told(f"measuring {name}", 0.0)
            left = without_ffns(model, layers)
            held_out = evaluate(left, tokens, length, HELD_OUT_WINDOWS)["held_out_loss"]
            done[layers] = {"layers": list(layers), "loss": loss_without(folded, ids, layers), "held_out_loss": held_out}
            if steps:
                trainer = Trainer(left.config, settings, tokens, output / name, start=left)
                trainer.resume()
                trainer.run(steps, None, partial(_tell, told, f"training {name}"), final_windows=HELD_OUT_WINDOWS)
                trainer.export(output / name / "checkpoint")
                if tokenizer is not None:
                    write_atomically(output / name / "checkpoint" / TOKENIZER, tokenizer)
                measured = evaluate(trainer.model, tokens, length, HELD_OUT_WINDOWS)
                done[layers]["trained_held_out_loss"] = measured["held_out_loss"]
        found[name] = done[layers]
    return found


def _tell(told: Told, stage: str, progress: Progress) -> None:
    told(stage, progress.fraction)
