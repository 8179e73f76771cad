"""`privinf analyze`: the entropy of a model's heads, what its FFNs are worth, causal traces, and which FFNs to remove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from privinf.cli import common
from protocols.errors import ConfigError

OUTPUT = Path("runs/analysis")


def analyze(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint directory, or the directory of a training run.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for analysis.json, plots and report.html.")
    ] = OUTPUT,
    corpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of text or code; default: this interpreter's standard library.")
    ] = None,
    files: Annotated[str | None, typer.Option(metavar="GLOB", help="Which files of the corpus, such as *.py.")] = None,
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Pieces of training text for entropy and ablation.")] = 32,
    length: Annotated[int | None, typer.Option(metavar="N", min=2, help="Tokens of each; default: 128, or what the model takes.")] = None,
    prompts: Annotated[int, typer.Option(metavar="N", min=0, help="Prompts to trace; 0 leaves the tracing out.")] = 16,
    prompt_length: Annotated[int, typer.Option(metavar="N", min=4, help="Tokens of each.")] = 24,
    remove: Annotated[int | None, typer.Option(metavar="K", help="Say which K FFNs to remove, and compare with AERO's K deepest.")] = None,
    train_steps: Annotated[int, typer.Option(metavar="N", min=0, help="Then train both for so many steps.")] = 0,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="The rate of that training.")] = 1e-3,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pieces of text in one step.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Names the random numbers.")] = 1,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processor threads; default: PyTorch's choice.")] = None,
    as_json: common.Json = False,
) -> None:
    """Show the entropy of a model's heads and say which FFNs it can do without.

    Example: privinf analyze models/pylib --remove 2 --train-steps 200
    """
    import torch

    from privinf.cli.screen import Screen
    from privinf.models.checkpoint import load_tokenizer, write_atomically
    from privinf.training.analysis import analyze_model, analyze_removal, text_for
    from privinf.training.corpus import read_corpus
    from privinf.training.ladder import load_ladder
    from privinf.training.pictures import read_metrics
    from privinf.training.removal import check_removal
    from privinf.training.report import write_report
    from privinf.training.settings import Settings

    if threads is not None:
        torch.set_num_threads(threads)
    run = model if (model / "checkpoint" / "config.json").is_file() else None
    network, config, tokenizer_json = load_ladder(model if run is None else model / "checkpoint")
    if remove is not None:
        check_removal(config, remove)
    elif train_steps:
        raise ConfigError("--train-steps without --remove", remedy="say how many FFNs to remove")
    length = min(128, config.n_positions) if length is None else length
    if max(length, prompt_length if prompts else 0) > config.n_positions:
        raise ConfigError(f"the model takes {config.n_positions} tokens at most", remedy="lower --length and --prompt-length")
    settings = Settings.checked(seed=seed, batch=batch, length=length, learning_rate=learning_rate, warmup_steps=min(50, train_steps // 5))
    with Screen(quiet=as_json, plain=True) as screen:
        told = screen.progress
        told("text", 0.0)
        tokenizer = None if tokenizer_json is None else load_tokenizer(tokenizer_json, config)
        documents = None if tokenizer is None else read_corpus(corpus, files)
        tokens, source = text_for(network, tokenizer, documents, None if train_steps else 2 * windows * length)
        output.mkdir(parents=True, exist_ok=True)
        found = analyze_model(
            network, tokens, windows=windows, length=length, prompts=prompts, prompt_length=prompt_length, seed=seed, told=told
        )
        found["text"]["source"] = source if corpus is None or tokenizer is None else "the given corpus"
        rows = read_metrics(run / "metrics.jsonl") if run is not None and (run / "metrics.jsonl").is_file() else []
        found["entropy"]["over_training"] = [row for row in rows if "entropy" in row] or None
        if remove is not None:
            found["removal"] = analyze_removal(
                network,
                tokens,
                remove,
                windows=windows,
                length=length,
                settings=settings,
                steps=train_steps,
                output=output,
                tokenizer=tokenizer_json,
                told=told,
            )
        told("plots", 0.0)
        write_atomically(output / "analysis.json", (json.dumps(found, indent=1) + "\n").encode())
        write_report(output, found)
    if as_json:
        common.write_json(found)
    else:
        _show(found, output)


def _show(found: dict[str, object], output: Path) -> None:
    import math
    from typing import Any, cast

    entropy, ffn, removal = (cast(dict[str, Any], found[name]) for name in ("entropy", "ffn", "removal"))
    print(f"entropy: {entropy['overload']:.0%} of the heads in overload, {entropy['collapse']:.0%} in collapse")
    for row in ffn["ablation"]:
        print(f"without the FFN of layer {row['layer']}: {row['increase']:+.4f} nats per token")
    if removal:
        for name in ("recommended", "deepest"):
            rule = removal[name]
            later = f", {math.exp(rule['trained_held_out_loss']):.2f} after training" if removal["trained_steps"] else ""
            print(f"{name}: remove {rule['layers']}: held-out perplexity {math.exp(rule['held_out_loss']):.2f}{later}")
    print(f"the page: {output / 'report.html'}")
