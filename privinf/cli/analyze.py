"""`privinf analyze`: the entropy of a model's heads, what its FFNs are worth, causal traces, and which FFNs to remove."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Text, Threads
from privinf.setting import Setting
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from privinf.models.aero import AeroConfig, AeroModel
    from privinf.training.settings import Settings

OUTPUT = Path("runs/analysis")


@dataclass(frozen=True)
class Looked:
    """How much of the text is looked at, and how many prompts are traced."""

    windows: Annotated[int, Setting("Pieces of training text for entropy and ablation.", "N", least=1)] = 32
    length: Annotated[int | None, Setting("Tokens of each; default: 128, or what the model takes.", "N", least=2)] = None
    prompts: Annotated[int, Setting("Prompts to trace; 0 leaves the tracing out.", "N", least=0)] = 16
    prompt_length: Annotated[int, Setting("Tokens of each.", "N", least=4)] = 24

    def within(self, positions: int) -> dict[str, int]:
        """What `analyze_model` takes; ConfigError where it is more than the model does."""
        length = min(128, positions) if self.length is None else self.length
        if max(length, self.prompt_length if self.prompts else 0) > positions:
            raise ConfigError(f"the model takes {positions} tokens at most", remedy="lower --length and --prompt-length")
        return {**vars(self), "length": length}


@dataclass(frozen=True)
class Removal:
    """Which FFNs are removed, and the training after that."""

    remove: Annotated[int | None, Setting("Say which K FFNs to remove, and compare with AERO's K deepest and what traces say.", "K")] = None
    train_steps: Annotated[int, Setting("Then train each choice for so many steps.", "N", least=0)] = 0
    learning_rate: Annotated[float, Setting("The rate of that training.", "X")] = 1e-3

    def check(self, config: AeroConfig) -> None:
        """ConfigError where the model has not so many, or there is nothing to train."""
        from privinf.training.removal import check_removal

        if self.remove is not None:
            check_removal(config, self.remove)
        elif self.train_steps:
            raise ConfigError("--train-steps without --remove", remedy="say how many FFNs to remove")


@expand()
def analyze(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint directory, or the directory of a training run.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for analysis.json, plots and report.html.")
    ] = OUTPUT,
    text: Text,
    looked: Looked,
    removal: Removal,
    batch: Annotated[int, Setting("Pieces of text in one step.", "N", least=1)] = 16,
    seed: Annotated[int, Setting("Names the random numbers.", "N", least=0)] = 1,
    threads: Threads = None,
    as_json: common.Json = False,
) -> None:
    """Show the entropy of a model's heads and say which FFNs it can do without.

    Example: privinf analyze models/pylib --remove 2 --train-steps 200
    """
    common.need("matplotlib")
    import torch

    from privinf.cli.screen import Screen
    from privinf.models.checkpoint import write_atomically
    from privinf.training.ladder import load_ladder
    from privinf.training.report import write_report
    from privinf.training.settings import Settings

    if threads is not None:
        torch.set_num_threads(threads)
    run = model if (model / "checkpoint" / "config.json").is_file() else None
    loaded = load_ladder(model if run is None else model / "checkpoint")
    removal.check(loaded[1])
    sizes = looked.within(loaded[1].n_positions)
    rates = {"learning_rate": removal.learning_rate, "warmup_steps": min(50, removal.train_steps // 5)}
    settings = Settings.checked(seed=seed, batch=batch, length=sizes["length"], **rates)
    with Screen(quiet=as_json, plain=True) as screen:
        found = _look(loaded, text, sizes, removal, settings, output, screen.progress)
        found["entropy"]["over_training"] = _over_training(run)
        screen.progress("plots", 0.0)
        write_atomically(output / "analysis.json", (json.dumps(found, indent=1) + "\n").encode())
        write_report(output, found)
    if as_json:
        common.write_json(found)
    else:
        _show(found, output)


def _look(
    loaded: tuple[AeroModel, AeroConfig, bytes | None],
    text: Text,
    sizes: dict[str, int],
    removal: Removal,
    settings: Settings,
    output: Path,
    told: Callable[[str, float], None],
) -> dict[str, Any]:
    """What is found in the model on the text, and what the removal does to it."""
    from privinf.models.checkpoint import load_tokenizer
    from privinf.training.analysis import analyze_model, analyze_removal, text_for
    from privinf.training.corpus import read_corpus

    network, config, stored = loaded
    told("text", 0.0)
    tokenizer = None if stored is None else load_tokenizer(stored, config)
    documents = None if tokenizer is None else read_corpus(text.corpus, text.files)
    tokens, source = text_for(network, tokenizer, documents, None if removal.train_steps else 2 * sizes["windows"] * sizes["length"])
    output.mkdir(parents=True, exist_ok=True)
    found = analyze_model(network, tokens, seed=settings.seed, told=told, **sizes)
    found["text"]["source"] = source if text.corpus is None or tokenizer is None else "the given corpus"
    if removal.remove is not None:
        where: dict[str, Any] = {"output": output, "tokenizer": stored, "told": told}
        where |= {name: sizes[name] for name in ("windows", "length")} | {"traced": found["ffn"]["traced"]}
        found["removal"] = analyze_removal(network, tokens, removal.remove, settings=settings, steps=removal.train_steps, **where)
    return found


def _over_training(run: Path | None) -> list[dict[str, Any]] | None:
    """The records of entropy that a training run left."""
    from privinf.training.pictures import read_metrics

    rows = read_metrics(run / "metrics.jsonl") if run is not None and (run / "metrics.jsonl").is_file() else []
    return [row for row in rows if "entropy" in row] or None


def _show(found: dict[str, Any], output: Path) -> None:
    from privinf.training.removal import RULES

    entropy, ffn, removal = (found[name] for name in ("entropy", "ffn", "removal"))
    print(f"entropy: {entropy['overload']:.0%} of the heads in overload, {entropy['collapse']:.0%} in collapse")
    for row in ffn["ablation"]:
        print(f"without the FFN of layer {row['layer']}: {row['increase']:+.4f} nats per token")
    if removal:
        for name in [name for name in RULES if name in removal]:
            rule = removal[name]
            later = f", {math.exp(rule['trained_held_out_loss']):.2f} after training" if removal["trained_steps"] else ""
            print(f"{RULES[name]}: remove {rule['layers']}: held-out perplexity {math.exp(rule['held_out_loss']):.2f}{later}")
    print(f"the page: {output / 'report.html'}")
