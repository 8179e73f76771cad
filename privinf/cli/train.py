"""`privinf train`: trains a variant of the ladder on text or code and writes a checkpoint directory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from privinf.cli import common
from protocols.errors import ConfigError

OUTPUT = Path("runs/pylib")
MINUTES = 55.0
ARCHITECTURE = ("variant", "layers", "heads", "width", "positions", "vocab", "tie")
PROMPTS = ("def main(", "import os\nimport sys\n\n", "class Node:\n    def __init__(self")


def train(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for state, metrics and, in `checkpoint/`, the model.")
    ] = OUTPUT,
    variant: Annotated[
        str, typer.Option(metavar="NAME", help="Name on the ladder, such as SM+LN+G, SM+ScFFN or SM(t)+ScFuFFN_i2.")
    ] = "SM(t)+ScFuFFN",
    corpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of text or code; default: this interpreter's standard library.")
    ] = None,
    files: Annotated[str | None, typer.Option(metavar="GLOB", help="Which files of the corpus, such as *.py.")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Begin with these weights, architecture and tokenizer.")
    ] = None,
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="Blocks.")] = 6,
    heads: Annotated[int, typer.Option(metavar="N", min=1, help="Attention heads of a block.")] = 8,
    width: Annotated[int, typer.Option(metavar="N", min=1, help="The size of a token's vector.")] = 256,
    positions: Annotated[int, typer.Option(metavar="N", min=1, help="The longest text, in tokens.")] = 256,
    vocab: Annotated[int, typer.Option(metavar="N", min=257, max=65536, help="Tokens of the tokenizer, which is trained too.")] = 3072,
    tie: Annotated[bool, typer.Option("--tie", help="Use the embedding as vocabulary projection too.")] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="End after so many steps. A run by steps repeats exactly.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.01, help=f"End after so much training time; {MINUTES} if --steps is not given either."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pieces of text in one step.")] = 16,
    optimizer: Annotated[
        Literal["adamw", "muon"], typer.Option(help="Of the layers' matrices; muon wants a processor that multiplies bfloat16.")
    ] = "adamw",
    learning_rate: Annotated[float, typer.Option(metavar="X", help="The level between warmup and decay.")] = 3e-3,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Steps of rising rate.")] = 200,
    decay: Annotated[float, typer.Option(metavar="X", min=0, max=1, help="Part of the run in which the rate falls to zero.")] = 0.4,
    entropy_lambda: Annotated[
        float, typer.Option(metavar="X", help="Weight of the entropy regularisation (AERO: 1e-5); 0 leaves it out.")
    ] = 0.0,
    entropy_gamma: Annotated[float, typer.Option(metavar="X", help="Its tolerance, as a part of the largest entropy.")] = 0.2,
    entropy_theta: Annotated[
        float, typer.Option(metavar="X", help="First value of its learnable thresholds, as a part of the largest entropy.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(metavar="X", help="First value of the learnable temperatures (AERO: 1e-2).")] = 1.0,
    ffn_norm: Annotated[
        Literal["none", "weight", "spectral"], typer.Option(help="Normalise the FFN matrices while training; folded at export.")
    ] = "none",
    initial: Annotated[Literal["ours", "gpt2"], typer.Option(help="Recipe of the first weights.")] = "ours",
    clip: Annotated[float, typer.Option(metavar="X", help="The largest norm of a step's gradients.")] = 1.0,
    range_weight: Annotated[
        float, typer.Option(metavar="X", help="Weight of the penalty on what fixed point cannot hold; 0 leaves it out.")
    ] = 1e-2,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Names the random numbers.")] = 1,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processor threads; default: PyTorch's choice.")] = None,
    bf16: Annotated[bool | None, typer.Option(help="Matrix products in bfloat16; default: where the processor has them.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: faster, needs a C++ compiler.")] = False,
    entropy_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Steps between records of every head's entropy; default: 25 records, or 100 steps."),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="The metrics also as TensorBoard events, in tensorboard/.")] = False,
    as_json: common.Json = False,
) -> None:
    """Train a variant of the ladder. Call it again with the same options to resume.

    Example: privinf train -o runs/small --variant "SM(t)+ScFuFFN" --layers 2 --width 64 --heads 2 --minutes 5
    """
    import torch

    from privinf.models.aero import AeroConfig
    from privinf.models.checkpoint import load_tokenizer, write_atomically
    from privinf.training import corpus as corpora
    from privinf.training.evaluation import continue_text
    from privinf.training.ladder import ladder_config, load_ladder
    from privinf.training.pictures import plot_loss
    from privinf.training.settings import Limits, Settings, bf16_is_fast
    from privinf.training.trainer import RUN, Trainer, write_run_file

    if steps is None and minutes is None:
        minutes = MINUTES
    if threads is not None:
        torch.set_num_threads(threads)
    given = [name for name in ARCHITECTURE if "DEFAULT" not in str(context.get_parameter_source(name))]
    if start is not None and given:
        raise ConfigError(
            f"--from and {', '.join('--' + name for name in given)} were given", remedy="--from has an architecture of its own"
        )
    first = None if start is None else load_ladder(start)

    def sized(vocab_size: int, end: int) -> AeroConfig:
        return ladder_config(
            variant,
            vocab_size=vocab_size,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            tie_word_embeddings=tie,
            bos_token_id=end,
            eos_token_id=end,
        )

    if first is None:
        sized(vocab, 0)  # refused before the work begins
    settings = Settings.checked(
        seed=seed,
        batch=batch,
        optimizer=optimizer,
        length=positions if first is None else first[1].n_positions,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        decay_fraction=decay,
        bf16=bf16_is_fast() if bf16 is None else bf16,
        initial=initial,
        temperature=temperature,
        ffn_norm=ffn_norm,
        clip=clip,
        entropy_lambda=entropy_lambda,
        entropy_gamma=entropy_gamma,
        entropy_theta=entropy_theta,
        limits=Limits(weight=range_weight) if 0 <= range_weight < float("inf") else {"weight": range_weight},
    )
    say = _Speaker(quiet=as_json)
    documents = corpora.read_corpus(corpus, files, say.line if corpus else lambda line: None)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    tokenizer_file = checkpoint / "tokenizer.json"
    if first is not None and not tokenizer_file.is_file():
        if first[2] is None:
            raise ConfigError(f"{start}: has no tokenizer", remedy="without it the corpus cannot become its tokens")
        write_atomically(tokenizer_file, first[2])
    if not tokenizer_file.is_file():
        say.line(f"training a tokenizer of {vocab} tokens on {len(documents)} files")
        corpora.save_tokenizer(corpora.train_tokenizer(documents, vocab), tokenizer_file)
    tokenizer = load_tokenizer(tokenizer_file)
    end = tokenizer.token_to_id(corpora.END)
    if end is None or tokenizer.get_vocab_size() > (vocab if first is None else 65536):
        raise ConfigError(f"{tokenizer_file}: not a tokenizer of this run", remedy="remove it to have it trained anew")
    config = sized(tokenizer.get_vocab_size(), end) if first is None else first[1]
    say.line(f"turning {len(documents)} files into tokens")
    tokens = corpora.encode_corpus(documents, tokenizer)
    corpus_id = corpora.fingerprint(documents)
    trainer = Trainer(config, settings, tokens, output, corpus_id, compile, None if first is None else first[0])
    resumed = trainer.resume()
    write_run_file(
        output,
        {
            "variant": config.variant,
            "config": json.loads(config.to_json()),
            "settings": settings.model_dump(mode="json"),
            "steps": steps,
            "minutes": minutes,
            "started_from": None if start is None else {"sha256": trainer.started_from},
            "corpus": {
                "files": len(documents),
                "sha256": corpus_id,
                "training_tokens": len(tokens.training),
                "held_out_tokens": len(tokens.held_out),
                "held_out_bytes": tokens.held_out_bytes,
                "held_out_modules": sorted({d.module for d in documents if d.held_out}),
            },
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "compiled": compile,
        },
    )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say.line(
        f"{'resuming' if resumed else 'training'} {config.variant}: {parameters:,} parameters, {len(tokens.training):,} tokens, "
        f"{len(tokens.held_out):,} held out; step {trainer.step}"
    )

    def sample(progress: Any) -> None:
        say.progress(progress)
        if progress.extra:
            trainer.export(checkpoint)
            for prompt in PROMPTS:
                say.line(repr(prompt + tokenizer.decode(continue_text(trainer.model, tokenizer.encode(prompt).ids, 40))))

    if tensorboard:
        trainer.listeners.append(_tensorboard(output / "tensorboard"))
    started = time.monotonic()
    try:
        with say:
            every = entropy_every or (max(1, steps // 25) if steps else 100)
            measured = trainer.run(steps, minutes, sample, entropy_every=every)
    except KeyboardInterrupt:
        if trainer.between_steps:
            trainer.save()
        say.line(f"stopped at step {trainer.step}; the same command resumes")
        raise
    trainer.export(checkpoint)
    result = {
        "variant": config.variant,
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "parameters": parameters,
        "checkpoint": str(checkpoint),
        "run": str(output / RUN),
    } | measured
    plot_loss(output)
    took = time.monotonic() - started
    say.line(f"done in {took:.0f} s: held-out perplexity {result['held_out_perplexity']:.2f}; the model is in {checkpoint}")
    if as_json:
        common.write_json(result)


class _Speaker:
    """A progress bar where a person looks, a plain line a minute elsewhere; all of it on stderr."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.bar = Progress(
                BarColumn(),
                TextColumn("{task.percentage:5.1f} %"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("starting", total=1.0)
        self.told = 0.0
        self.mean = 0.0

    def __enter__(self) -> _Speaker:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *unused: object) -> Literal[False]:
        if self.bar is not None:
            self.bar.stop()
        return False

    def line(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def progress(self, progress: Any) -> None:
        if progress.extra:
            self.line(f"step {progress.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in progress.extra.items()))
            return
        self.mean = progress.loss if self.mean == 0 else 0.98 * self.mean + 0.02 * progress.loss
        text = f"step {progress.step}, loss {self.mean:.3f}, rate {progress.rate:.1e}, {progress.tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=progress.fraction, description=text)
        elif time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            self.line(f"{100 * progress.fraction:5.1f} %  {text}, {progress.elapsed_s / 60:.1f} min")


def _tensorboard(directory: Path) -> Callable[[dict[str, Any]], None]:
    """What writes a row of the metrics as TensorBoard events: numbers as scalars, the heads' entropies as a histogram."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard: the package tensorboard is missing", remedy="pip install tensorboard") from None
    import torch

    writer = SummaryWriter(str(directory))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, row["step"])
        if "entropy" in row:
            writer.add_histogram("entropy", torch.tensor(row["entropy"]), row["step"])
        writer.flush()

    return write
