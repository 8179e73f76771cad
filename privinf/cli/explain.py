"""`privinf explain`: the cost of a pass, before it, and the rings that its values live in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import NO_PEER, Embedding, Logits, Model, Trust
from privinf.session.options import Lengths, Runtime
from privinf.setting import Setting
from privinf.trust import DEALER, ENCRYPTED, TEXTS, TWO_PARTY
from protocols.errors import ConfigError

_COLUMNS = {
    "online_bytes": "online",
    "rounds": "rounds",
    "dealer_bytes": "dealer",
    "peer_offline_bytes": "offline\nS-C",
    "setup_bytes": "set-up",
    "macs": "mult-\nadds",
}
_ALONE = {
    **{name: title for name, title in _COLUMNS.items() if name not in ("dealer_bytes", "peer_offline_bytes", "macs")},
    "offline_bytes": "offline",
    "offline_rounds": "offline\nrounds",
    "macs": "mult-\nadds",
}
"""Where there is no dealer."""
_KINDS = {"count": "corre-\nlations", "offline_bytes": "offline", "transfers": "trans-\nfers"}


@expand(without=("pad_prompt", "pad_reply", *NO_PEER))
def explain(
    *,
    model: Model,
    seq: Annotated[int, Setting("Tokens of the prompt; where some are cached, the new ones.", "N", least=1)],
    max_new_tokens: Annotated[int, Setting("Output tokens.", "N", least=1)] = 1,
    lengths: Lengths,
    cached: Annotated[int, Setting("Positions that both parties hold already.", "L", least=0)] = 0,
    logits: Logits = False,
    scores: Annotated[bool, Setting("Rounded logits of every position of the prompt, as `echo` with `logprobs` takes.")] = False,
    trust: Trust = DEALER,
    embedding: Embedding = None,
    batch: Annotated[int, Setting("Such prompts that go through the same passes.", "B", least=1, most=1024)] = 1,
    stock: Annotated[int, Setting("Without a dealer: rows come from a stock for N positions (`prepare --stock N`).", "N", least=0)] = 0,
    link: Annotated[str | None, Setting("Predict seconds too, over loopback, lan, wan, 4g or RTTms:MBITS; with a dealer.", "LINK")] = None,
    device: Annotated[str, Setting("With --link: where the parties compute.", choices=("cpu", "cuda"))] = "cpu",
    measure: Annotated[bool, Setting("With --link: measure this machine anew, and do not take what is kept.")] = False,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Predict the cost of one prompt of N tokens and one output token, or several.

    Nothing is run. The figures equal what `privinf run --max-new-tokens 1`
    counts, per layer and operator, with --chunk N too. With --cached L they are
    those of a query that goes on from L positions: --seq 1 --cached L is the
    cost of one more token. With --batch B all of it is of B prompts that are
    answered together. With --stock N the query's rows come from a stock,
    whose own price stands below. Below them stands the ring plan: of each
    wire the bits that it travels in, how many are fraction, the largest value
    that it is planned for, and what that follows from. With --link LINK it
    says seconds as well, from these costs and a measurement of this machine,
    which takes half a minute or so once and is kept in the cache.

    Example: privinf explain models/pylib --seq 128
    """
    from privinf.lowering.explain import explain as predict
    from privinf.server.models import open_model

    if link is not None:
        _check_seconds(link, device, trust, embedding)
    elif measure or device != "cpu":
        raise ConfigError("without a link there are no seconds to predict", remedy="give --link too, for example --link loopback")
    lowered = open_model(model, runtime.cache)
    size: dict[str, int] = {"new_tokens": max_new_tokens, "chunk": lengths.chunk, "cached": cached, "batch": batch}
    prediction = predict(lowered, seq, logits=logits, scores=scores, **size, trust=trust, embedding=embedding, stock=stock)
    if link is not None:
        asked: dict[str, Any] = {"logits": logits, "scores": scores, **size}
        del asked["new_tokens"]
        prediction["seconds"] = _seconds(lowered, seq, link, device, runtime.cache, measure, asked)
    if as_json:
        common.write_json(prediction)
    else:
        _show(prediction, _ALONE if trust == TWO_PARTY else _COLUMNS)


def _check_seconds(link: str, device: str, trust: str, embedding: str | None) -> None:
    from privinf.session.devices import check_device
    from privinf.session.pace import link_of

    link_of(link)
    check_device(device)
    if trust == TWO_PARTY or embedding == ENCRYPTED:
        raise ConfigError("seconds are predicted with a dealer and one-hots alone", remedy="leave --link out")


def _seconds(lowered: Any, seq: int, link: str, device: str, cache: Path, measure: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """The JSON's `seconds`."""
    from privinf.cli.screen import Screen
    from privinf.local.pace import pace_of
    from privinf.session.pace import link_of, seconds

    with Screen(quiet=False, plain=True) as screen:
        screen.say("measuring this machine, once")
        pace = pace_of(cache, device, anew=measure)
    found = link_of(link)
    about = {"rtt_ms": found.rtt_ms, "mbit_s": found.mbit_s} if found else {"rtt_ms": None, "mbit_s": None}
    return {**seconds(lowered, pace, found, seq, **asked), "link": about, "device": device, "machine": pace.speeds()}


def _show(prediction: dict[str, Any], titles: dict[str, str]) -> None:
    from privinf.cli.table import Column, console_for_tables, show_table

    console = console_for_tables()
    ops = [*prediction["ops"], {"layer": "total", "op": "", **prediction["total"]}]
    names = Column("layer and operator", [f"{op['layer']} {op['op']}".strip() for op in ops], words=True)
    show_table(console, names, [Column(title, [_figure(key, op[key]) for op in ops]) for key, title in titles.items()], bold={len(ops) - 1})
    if "kinds" in prediction:
        _show_kinds(console, prediction["kinds"])
    if "stock" in prediction:
        _show_stock(console, prediction["stock"])
    headroom = next((each["from"] for each in prediction["wires"] if each["from"] and " x " in each["from"]), "")
    console.print(f"\nring plan{headroom and f' ({headroom})'}", style="bold")
    named, *plan = (list(cells) for cells in zip(*_grouped(prediction["wires"]), strict=True))
    heads = ("bits", "frac", "values\nup to", "from", "layers")
    columns = [Column(title, cells, words=title in ("from", "layers")) for title, cells in zip(heads, plan, strict=True)]
    show_table(console, Column("operator and wire", named, words=True), columns)
    console.print(f"\ntrust: {TEXTS[prediction['trust']]}")
    if "seconds" in prediction:
        _show_seconds(console, prediction["seconds"])


def _show_seconds(console: Any, found: dict[str, Any]) -> None:
    from privinf.session.pace import in_words

    link = "loopback" if found["link"]["rtt_ms"] is None else f"{found['link']['rtt_ms']:g} ms, {found['link']['mbit_s']:g} Mbit/s"
    console.print(f"\nabout, set-up aside, over {link}, {found['device']}: {in_words(found)}", style="bold")
    console.print(f"this machine: {found['machine']}")


def _show_kinds(console: Any, kinds: list[dict[str, Any]]) -> None:
    from privinf.cli.table import Column, show_table

    console.print("\nwhat server and client make before the query (preprocess), by kind", style="bold")
    total = {"kind": "total", **{key: sum(each[key] for each in kinds) for key in _KINDS}}
    names = Column("kind", [each["kind"] for each in (*kinds, total)], words=True)
    columns = [Column(title, [_figure(key, each[key]) for each in (*kinds, total)]) for key, title in _KINDS.items()]
    show_table(console, names, columns, bold={len(kinds)})


def _show_stock(console: Any, stock: dict[str, int]) -> None:
    made, part = common.human_bytes(stock["offline_bytes"]), common.human_bytes(stock["used_bytes"])
    text = f"rows for {stock['rows']} positions of {stock['maps']} maps, {made} to make in {stock['offline_rounds']} rounds"
    console.print(f"\nstock: {text}; of these this takes {stock['used']}, {part}")


def _grouped(wires: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Operator and wire, bits, fraction, bound, origin, layers.

    Wires that differ in their layer alone share a line, in the order of the first layer.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    order: dict[tuple[str, ...], int] = {}
    for each in wires:
        order.setdefault((each["op"], each["wire"]), len(order))
    for each in wires:
        bound = "" if each["range"] is None else f"{each['range']:.4g}"
        origin = (each["from"] or "the server knows").partition(" x ")[0]
        key = (each["op"], each["wire"], str(each["bits"]), str(each["frac"]), bound, origin)
        found.setdefault(key, []).append(each["layer"])
    ordered = sorted(found.items(), key=lambda item: order[item[0][:2]])
    return [(f"{op} {wire}", *rest, _layers(layers)) for (op, wire, *rest), layers in ordered]


def _layers(names: list[str]) -> str:
    """`h.0-3, h.5`: runs of numbered layers in short."""
    runs: list[list[str]] = []
    for name in names:
        stem, _, number = name.rpartition(".")
        if runs and number.isdigit() and runs[-1][-1] == f"{stem}.{int(number) - 1}":
            runs[-1].append(name)
        elif name:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs)


def _figure(key: str, value: int) -> str:
    if not value:
        return "-"
    return common.human_bytes(value) if key.endswith("bytes") else common.human_count(value)
