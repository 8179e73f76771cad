"""`privinf explain`: the cost of a pass, before it."""

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
    seq: Annotated[int, typer.Option("--seq", metavar="N", min=1, help="Tokens of the prompt.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Output tokens.")] = 1,
    logits: common.Logits = False,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Predict the cost of one prompt of N tokens and one output token, or several.

    Nothing is run. The figures equal what `privinf run --max-new-tokens 1`
    counts, per layer and operator.

    Example: privinf explain models/pylib --seq 128
    """
    options = common.make_options(cache=cache)
    from privinf.lowering.explain import explain as predict
    from privinf.party.models import open_model

    prediction = predict(open_model(model, options.cache), seq, logits=logits, new_tokens=max_new_tokens)
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
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)


def _figure(key: str, value: int) -> str:
    if not value:
        return "-"
    return common.human_bytes(value) if key.endswith("bytes") else f"{value:,}"
