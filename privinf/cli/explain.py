"""`privinf explain`: the cost of a pass, before it, and the rings that its values live in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from privinf.cli import common

_COLUMNS = {
    "online_bytes": "online",
    "rounds": "rounds",
    "dealer_bytes": "dealer",
    "peer_offline_bytes": "offline S-C",
    "setup_bytes": "set-up",
    "macs": "multiply-adds",
}


def explain(
    model: common.Model,
    seq: Annotated[int, typer.Option("--seq", metavar="N", min=1, help="Tokens of the prompt; where some are cached, the new ones.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Output tokens.")] = 1,
    chunk: common.Chunk = 0,
    cached: Annotated[int, typer.Option("--cached", metavar="L", min=0, help="Positions that both parties hold already.")] = 0,
    logits: common.Logits = False,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Predict the cost of one prompt of N tokens and one output token, or several.

    Nothing is run. The figures equal what `privinf run --max-new-tokens 1`
    counts, per layer and operator, with --chunk N too. With --cached L they are
    those of a query that goes on from L positions: --seq 1 --cached L is the
    cost of one more token. Below them stands the ring plan: of each
    wire the bits that it travels in, how many are fraction, the largest value
    that it is planned for, and what that follows from.

    Example: privinf explain models/pylib --seq 128
    """
    options = common.make_options(cache=cache)
    from privinf.lowering.explain import explain as predict
    from privinf.party.models import open_model

    lowered = open_model(model, options.cache)
    prediction = predict(lowered, seq, logits=logits, new_tokens=max_new_tokens, chunk=chunk, cached=cached)
    if as_json:
        common.write_json(prediction)
    else:
        _show(prediction)


def _show(prediction: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("operator", no_wrap=True)
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for op in [*prediction["ops"], {"layer": "total", "op": "", **prediction["total"]}]:
        table.add_row(op["layer"], op["op"], *(_figure(key, op[key]) for key in _COLUMNS), style="bold" if op["layer"] == "total" else "")
    plan = Table(box=None, pad_edge=False)
    for title in ("operator", "wire", "bits", "fraction", "values up to", "from", "layers"):
        plan.add_column(title, justify="right" if title in ("bits", "fraction", "values up to") else "left", no_wrap=title != "layers")
    for row in _grouped(prediction["wires"]):
        plan.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
    console.print("\nring plan", style="bold")
    console.print(plan)


def _grouped(wires: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Wires that differ in their layer alone share a line; operators and their wires in the order of the first layer."""
    found: dict[tuple[str, ...], list[str]] = {}
    order: dict[tuple[str, ...], int] = {}
    for each in wires:
        order.setdefault((each["op"], each["wire"]), len(order))
    for each in wires:
        bound = "" if each["range"] is None else f"{each['range']:.4g}"
        key = (each["op"], each["wire"], str(each["bits"]), str(each["frac"]), bound, each["from"] or "the server knows")
        found.setdefault(key, []).append(each["layer"])
    return [(*key, _layers(layers)) for key, layers in sorted(found.items(), key=lambda item: order[item[0][:2]])]


def _layers(names: list[str]) -> str:
    """`h.0 to h.3, h.5`: runs of numbered layers in short."""
    runs: list[list[str]] = []
    for name in names:
        stem, _, number = name.rpartition(".")
        if runs and number.isdigit() and runs[-1][-1] == f"{stem}.{int(number) - 1}":
            runs[-1].append(name)
        elif name:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _figure(key: str, value: int) -> str:
    if not value:
        return "-"
    return common.human_bytes(value) if key.endswith("bytes") else f"{value:,}"
