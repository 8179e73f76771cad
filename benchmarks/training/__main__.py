"""`python -m benchmarks.training COMMAND`, from the repository root; the commands stand in docs/softmax-only.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from protocols.errors import PrivinfError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
DATA = Path("docs/softmax-only")
ARCHITECTURES = Path("docs/architectures")
Engine = Annotated[str, typer.Option(help="here, or ray: each run an actor on a Ray cluster whose nodes share the directory of the runs.")]
RayAddress = Annotated[str, typer.Option(help="The cluster; auto: the one of this machine.")]
Out = Annotated[Path, typer.Option(help="Where the runs are.")]


@app.command()
def ladder(
    out: Out = Path("runs/ladder"),
    steps: Annotated[int, typer.Option(min=1)] = 600,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 2,
    only: Annotated[str | None, typer.Option(help="Rows with this in their name.")] = None,
    target: Annotated[Path, typer.Option(help="The document of results.")] = DATA / "ladder.json",
    engine: Engine = "here",
    ray_address: RayAddress = "auto",
) -> None:
    """Train the ladder. Interrupted, the same command goes on."""
    from benchmarks.training.ladder import gather, train_rows
    from benchmarks.training.rows import ROWS

    train_rows(out, ROWS, steps, seeds, workers, only, engine=engine, address=ray_address)
    gather(out, target, steps)


@app.command()
def architectures(
    out: Out = Path("runs/architectures"),
    steps: Annotated[int, typer.Option(min=1)] = 400,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 2,
    only: Annotated[str | None, typer.Option(help="Rows with this in their name.")] = None,
    target: Annotated[Path, typer.Option(help="The document of results.")] = ARCHITECTURES / "architectures.json",
    timed: Annotated[bool, typer.Option("--timed", help="Train and price nothing; time a private session of each.")] = False,
    engine: Engine = "here",
    ray_address: RayAddress = "auto",
) -> None:
    """Train networks of all families alike, and ask what each costs in private. Interrupted, the same command goes on."""
    from benchmarks.training.architectures import ROWS, SIZES, gather, time_rows
    from benchmarks.training.compared import picture
    from benchmarks.training.ladder import train_rows

    if timed:
        time_rows(out, target)
        return
    train_rows(out, ROWS, steps, seeds, workers, only, SIZES, engine=engine, address=ray_address)
    gather(out, target, steps)
    if figure := picture(json.loads(target.read_text("utf-8"))):
        figure.savefig(target.with_suffix(".png"), metadata={"Software": None})


@app.command()
def removal(
    models: Annotated[list[Path] | None, typer.Argument(help="Checkpoints of the ladder; default: those in models/.")] = None,
    out: Annotated[Path, typer.Option(help="Where the analyses are.")] = Path("runs/analysis"),
    most: Annotated[int, typer.Option(min=1, help="From 1 to so many FFNs.")] = 3,
    steps: Annotated[int, typer.Option(min=0, help="Of the second training, after two are removed.")] = 150,
    target: Path = DATA / "removal.json",
) -> None:
    """Analyse models and compare which FFNs to remove with AERO's rule."""
    from benchmarks.training.removal import measure

    measure(target, out, models or [Path("models", name) for name in ("pylib", "pylib-gpt2")], range(1, most + 1), steps)


@app.command()
def floats(
    target: Path = DATA / "float.json",
    size: Annotated[str, typer.Option(help="shipped, gpt2, or both with a comma.")] = "shipped,gpt2",
    samples: Annotated[int, typer.Option(min=1)] = 5,
    compile: bool = True,
) -> None:
    """Measure ordinary inference."""
    from benchmarks.training.floats import measure

    measure(target, size.split(","), samples, compile)


@app.command()
def speed(
    target: Path = DATA / "speed.json",
    samples: Annotated[int, typer.Option(min=4, help="Steps of each.")] = 24,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure a training step beside a plain PyTorch loop."""
    from benchmarks.training.speed import measure

    measure(target, samples, threads)


@app.command()
def card(model: Annotated[Path, typer.Argument()] = Path("models/pylib")) -> None:
    """Print what a model's card says: perplexities, ranges, continuations."""
    from benchmarks.training.card import card as described

    print(described(model))


@app.command()
def drawn(
    out: Annotated[Path, typer.Argument(help="The checkpoint's directory.")] = Path("runs/smollm2"),
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Write a checkpoint of SmolLM2's shape with random weights: 135 million, for `python -m benchmarks shipped`."""
    from benchmarks.training.rows import SMOLLM2 as sizes
    from benchmarks.training.rows import Row
    from privinf.models.checkpoint import save_checkpoint
    from privinf.training.families import built, first_weights

    config = Row("SmolLM2", "SM+RN+SwiGLU", family="llama", sizes={"tie_word_embeddings": True}).config(sizes)
    model = built(config)
    first_weights(model, seed)
    save_checkpoint(model, config, out)


@app.command()
def page(
    check: Annotated[bool, typer.Option(help="Write nothing; fail if a table differs from its file.")] = False,
) -> None:
    """Fill the pages' tables from the files of results."""
    from benchmarks.training.page import filled

    for data in (DATA, ARCHITECTURES):
        path = data.with_suffix(".md")
        text = path.read_text("utf-8")
        new = filled(text, data)
        if check and new != text:
            raise SystemExit(f"{path}: a table differs from the files in {data}; run `python -m benchmarks.training page`")
        if not check:
            path.write_text(new, "utf-8")


if __name__ == "__main__":
    try:
        app()
    except PrivinfError as error:
        raise SystemExit(f"error: {error}") from None
