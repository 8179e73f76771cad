"""An analysis as plots and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from privinf.models.checkpoint import write_atomically
from privinf.training import pictures
from privinf.training.removal import RULES

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}p.note{color:#555}"""


def write_report(directory: Path, found: dict[str, Any]) -> None:
    """Writes the plots and report.html of what `privinf.cli.analyze` found."""
    e_max = found["entropy"]["max"]
    pictures.plot_entropy_end(directory / "entropy.png", found["entropy"]["heads"], e_max)
    over_training = found["entropy"]["over_training"]
    if over_training:
        pictures.plot_entropy_over_training(directory / "entropy_training.png", over_training)
    ablation = found["ffn"]["ablation"]
    if ablation:
        labels, values = [str(row["layer"]) for row in ablation], [row["increase"] for row in ablation]
        pictures.plot_bars(directory / "ffn.png", labels, values, "nats per token", "loss added by removing one FFN, by layer")
    tracing = found["tracing"]
    if tracing:
        pictures.plot_tracing(directory / "tracing_probability.png", tracing["probability"], tracing["places"], "probability")
        pictures.plot_tracing(directory / "tracing_entropy.png", tracing["entropy"], tracing["places"], "entropy, nats")
    write_atomically(directory / "report.html", _page(directory, found).encode())


def _page(directory: Path, found: dict[str, Any]) -> str:
    model, removal = found["model"], found["removal"]
    parts = [*_model(found), *_entropy(directory, found["entropy"]), *_ffn(directory, found["ffn"])]
    parts += _tracing(directory, found["tracing"]) if found["tracing"] else []
    parts += _removal(removal) if removal else []
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(model["variant"])}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _model(found: dict[str, Any]) -> list[str]:
    model, text = found["model"], found["text"]
    return [
        f"<h1>{html.escape(model['variant'])}</h1>",
        f"<p>{model['layers']} layers, {model['heads']} heads, width {model['width']}, vocabulary {model['vocab']}. "
        f"Text: {html.escape(text['source'])}, {text['windows']} windows of {text['length']} tokens of what "
        f"was trained on; loss {found['ffn']['loss']:.3f} nats per token.</p>",
    ]


def _entropy(directory: Path, entropy: dict[str, Any]) -> list[str]:
    parts = [
        "<h2>Entropy of attention</h2>",
        _table(
            ["", "fraction of heads"],
            [
                ["overload: 3/4 of log T and above", f"{entropy['overload']:.2f}"],
                ["collapse: 1/20 of log T and below", f"{entropy['collapse']:.2f}"],
                *([f"quarter {n} of log T", f"{entropy[f'quarter_{n}']:.2f}"] for n in range(1, 5)),
            ],
        ),
        f'<p class="note">log T is {entropy["max"]:.3f} nats; a head that looks evenly at all it may see has {entropy["even"]:.3f}.</p>',
        _image(directory / "entropy.png", "Entropy of every head"),
    ]
    if entropy["over_training"]:
        parts.append(_image(directory / "entropy_training.png", "Entropy of every head over the training"))
    return parts


def _ffn(directory: Path, ffn: dict[str, Any]) -> list[str]:
    title, carried = "<h2>What the FFNs are worth</h2>", ffn["traced"]
    if not ffn["ablation"]:
        return [title, "<p>This model has no FFN.</p>"]
    rows = [
        [row["layer"], f"{row['loss']:.4f}", f"{row['increase']:+.4f}", *_with_errors(carried, row["layer"])] for row in ffn["ablation"]
    ]
    effects = [f"indirect effect of the FFN on the {name}, its standard error" for name in carried or ()]
    table = _table(["layer", "loss without its FFN", "added", *effects], rows)
    return [title, table, _image(directory / "ffn.png", "Loss added by removing one FFN")]


def _with_errors(traced: dict[str, Any] | None, layer: int) -> list[str]:
    return ["{:+.4f} ± {:.4f}".format(*of_layer[str(layer)]) for of_layer in (traced or {}).values()]


def _tracing(directory: Path, tracing: dict[str, Any]) -> list[str]:
    return [
        "<h2>Causal tracing</h2>",
        f"<p>{tracing['prompts']} prompts. The next token's probability is "
        f"{tracing['clean_probability']:.3f}, and "
        f"{tracing['corrupted_probability']:.3f} with noise on {tracing['span']} tokens; the attention's entropy at the last token "
        f"changes by {tracing['total_entropy_change']:.3f} nats a head. The maps show how much of either comes back when one value is "
        "restored.</p>",
        _image(directory / "tracing_probability.png", "Indirect effect on the next token"),
        _image(directory / "tracing_entropy.png", "Indirect effect on the entropy"),
    ]


def _removal(removal: dict[str, Any]) -> list[str]:
    sets = [(label, removal[name]) for name, label in RULES.items() if name in removal]
    trained = removal["trained_steps"]
    return [
        f"<h2>Removing {removal['remove']}</h2>",
        _table(
            ["", "layers", "perplexity, training text", "held out", *([f"held out, {trained} steps later"] if trained else [])],
            [
                [
                    name,
                    ", ".join(map(str, rule["layers"])),
                    f"{math.exp(rule['loss']):.2f}",
                    f"{math.exp(rule['held_out_loss']):.2f}",
                    *([f"{math.exp(rule['trained_held_out_loss']):.2f}"] if trained else []),
                ]
                for name, rule in sets
            ],
        ),
        f'<p class="note">Chosen on training text alone. With all FFNs: held out {math.exp(removal["held_out_loss"]):.2f}.</p>',
    ]


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _image(path: Path, alt: str) -> str:
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'
