"""The plots of a run and of an analysis: axes that count have whole numbers only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privinf.training import pictures

LAYERS, HEADS, PLACES = 2, 3, ["first", "last"]
ENTROPY = [[0.5 + layer + head / 4 for head in range(HEADS)] for layer in range(LAYERS)]
ROWS = [{"step": step, "entropy": ENTROPY, "entropy_max": 4.0, "overload": 0.25, "collapse": 0.0} for step in range(3)]
EFFECTS = {kind: [[0.1, -0.2]] * LAYERS for kind in ("state", "attention", "FFN")}


def loss(path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 3.0 - step} for step in range(3)]
    (path.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 2, "held_out_loss": 1.5}]))
    pictures.plot_loss(path.parent)


DRAW: dict[str, Callable[[Path], None]] = {
    "loss": loss,
    "entropy": lambda path: pictures.plot_entropy_end(path, ENTROPY, 4.0),
    "entropy of one layer": lambda path: pictures.plot_entropy_end(path, ENTROPY[:1], 4.0),
    "entropy over training": lambda path: pictures.plot_entropy_over_training(path, ROWS),
    "ffn": lambda path: pictures.plot_bars(path, ["0", "1"], [0.5, 0.25], "nats", "title"),
    "tracing": lambda path: pictures.plot_tracing(path, EFFECTS, PLACES, "probability"),
}
COUNTED = ("step", "layer", "head")


@pytest.mark.parametrize("name", DRAW)
def test_layers_heads_and_steps_are_whole_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[str] = []

    def look(figure: Figure, *_: Any, **__: Any) -> None:
        figure.canvas.draw()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_label_text().startswith(COUNTED):
                    low, high = sorted(axis.get_view_interval())
                    inside = [
                        label.get_text() for label in axis.get_ticklabels() if low <= label.get_position()[axis is axes.yaxis] <= high
                    ]
                    assert inside
                    seen.extend(inside)

    monkeypatch.setattr(Figure, "savefig", look)
    monkeypatch.setattr(pictures, "write_atomically", lambda path, data: None)
    DRAW[name](tmp_path / "picture.png")
    assert all(text.replace("\N{MINUS SIGN}", "-").lstrip("-").isdigit() for text in seen)
    assert seen or name == "ffn"
