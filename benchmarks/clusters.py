"""Commands of what several processes, or the machines of a cluster, do together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.options import Files, listed
from benchmarks.perform import perform
from privinf.cli.expand import expand
from protocols.errors import ConfigError

SHIPPED = Path("models/pylib")


@expand()
def jobs(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL")] = SHIPPED,
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Of 16 tokens, all different.")] = 2000,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New ones of each.")] = 8,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Of the job, at a time.")] = 2,
    kills: Annotated[int, typer.Option("--kills", min=0, help="Of the job, by SIGKILL at random moments.")] = 10,
    nodes: Annotated[int, typer.Option("--nodes", min=0, help="A Ray cluster of so many on this machine, of which one is removed.")] = 0,
    alone: Annotated[int, typer.Option("--alone", min=0, help="Prompts that are asked one by one too.")] = 50,
    files: Files,
) -> None:
    """`privinf batch` killed, or its cluster cut: each prompt answered once. `python -m benchmarks jobs --prompts 200 --kills 3`"""
    from benchmarks.scenarios.jobs import Extent
    from benchmarks.scenarios.jobs import jobs as scenario

    if nodes == 1:
        raise ConfigError("a cluster of which a node is removed has two at least", remedy="give --nodes 3, or 0 for none")
    extent = Extent(prompts, tokens, sessions, kills, nodes, alone)
    perform("jobs", (files.json, files.csv, files.markdown), lambda run, work: scenario(run, work, model=model, extent=extent))


@expand()
def farm(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL")] = SHIPPED,
    workers: Annotated[str, typer.Option("--workers", metavar="A,B", help="How many prepare at a time.")] = "1,2,4",
    each: Annotated[int, typer.Option("--each", min=1, help="Queries that each of them prepares, after a first one.")] = 6,
    seq: Annotated[int, typer.Option("--seq", min=1, help="Prompt tokens of a query.")] = 16,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens of a query.")] = 8,
    files: Files,
) -> None:
    """Prepared queries a second by workers of a Ray cluster on this machine, and the bound beyond. `python -m benchmarks farm`"""
    from benchmarks.scenarios.farm import farm as scenario

    words = listed(workers)
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--workers {workers!r} is no list of counts", remedy="give one like 1,2,4")
    chosen: dict[str, Any] = {"counts": [int(word) for word in words], "each": each, "seq": seq, "tokens": tokens}
    perform("farm", (files.json, files.csv, files.markdown), lambda run, work: scenario(run, work, model=model, **chosen))


@expand()
def workers(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL")] = SHIPPED,
    count: Annotated[int, typer.Option("--workers", min=2, help="Of server and dealer each, beside one.")] = 2,
    clients: Annotated[int, typer.Option("--clients", min=1, help="At once.")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="New ones of each reply.")] = 16,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rounds of each, in turn.")] = 5,
    files: Files,
) -> None:
    """Tokens a second with several workers and with one, and memory of a worker. `python -m benchmarks workers --samples 3`"""
    from benchmarks.scenarios.workers import workers as scenario

    extent = {"count": count, "clients": clients, "tokens": tokens, "samples": samples}
    perform("workers", (files.json, files.csv, files.markdown), lambda run, work: scenario(run, model, work, **extent))
