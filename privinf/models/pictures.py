"""Plots of a training run and of an analysis. Matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privinf.models.checkpoint import write_atomically

Rows = Sequence[Sequence[float]]


@contextmanager
def drawing(path: Path, columns: int = 1, size: tuple[float, float] = (7, 4.2)) -> Iterator[Any]:
    """The axes of a figure, or a list of them, that is written as PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained")
    try:
        yield axes if columns == 1 else list(axes)
        data = io.BytesIO()
        figure.savefig(data, dpi=110, format="png", metadata={"Software": None})
        write_atomically(path, data.getvalue())
    finally:
        pyplot.close(figure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_loss(run: Path) -> None:
    """Writes loss.png from a run's metrics."""
    rows = read_metrics(run / "metrics.jsonl")
    with drawing(run / "loss.png") as axes:
        training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        span = max(1, len(training) // 200)
        smooth = []
        for index in range(len(training)):
            recent = [loss for _, loss in training[max(0, index - span) : index + 1]]
            smooth.append(sum(recent) / len(recent))
        axes.plot([step for step, _ in training], smooth, label="training", linewidth=1)
        *samples, whole = [row for row in rows if "held_out_loss" in row]
        axes.plot(
            [row["step"] for row in samples], [row["held_out_loss"] for row in samples], "o-", label="held-out, a sample", markersize=3
        )
        axes.plot([whole["step"]], [whole["held_out_loss"]], "*", label="held-out, all of it", markersize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("cross entropy, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()


def heat_map(axes: Any, values: Rows, x: str, y: str, title: str, top: float | None = None, centred: bool = False) -> None:
    """values[row][column], rows from below; `centred` puts zero in the middle of the colours."""
    largest = max((abs(v) for row in values for v in row), default=1.0) or 1.0
    limits = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"} if centred else {"vmin": 0, "vmax": top or largest, "cmap": "viridis"}
    image = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **limits)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes)


def plot_entropy_end(path: Path, entropy: Rows, e_max: float) -> None:
    """entropy[layer][head] in nats."""
    with drawing(path, size=(6, 0.35 * len(entropy) + 2)) as axes:
        heat_map(axes, [[v / e_max for v in row] for row in entropy], "head", "layer", "entropy, as a part of log T", top=1.0)
        for layer, row in enumerate(entropy):
            for head, value in enumerate(row):
                if len(row) <= 16 and len(entropy) <= 24:
                    axes.text(head, layer, f"{value / e_max:.2f}", ha="center", va="center", color="white", fontsize=7)


def plot_entropy_over_training(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every head's entropy by step, and the fractions of heads in overload and collapse."""
    steps = [row["step"] for row in rows]
    heads = [
        [row["entropy"][layer][head] / row["entropy_max"] for row in rows]
        for layer in range(len(rows[0]["entropy"]))
        for head in range(len(rows[0]["entropy"][0]))
    ]
    with drawing(path, columns=2, size=(11, 4.5)) as (left, right):
        heat_map(left, heads, "step", "head, from the first layer up", "entropy, as a part of log T", top=1.0)
        ticks = sorted({0, len(steps) // 2, len(steps) - 1})
        left.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
        for name in ("overload", "collapse"):
            right.plot(steps, [row[name] for row in rows], "o-", label=name, markersize=3)
        right.set_ylim(-0.02, 1.02)
        right.set_xlabel("step")
        right.set_ylabel("fraction of heads")
        right.grid(alpha=0.3)
        right.legend()


def plot_bars(path: Path, labels: Sequence[str], values: Sequence[float], ylabel: str, title: str) -> None:
    with drawing(path, size=(7, 3.4)) as axes:
        axes.bar(range(len(values)), values)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylabel(ylabel)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, axis="y")


def plot_tracing(path: Path, effects: dict[str, Rows], places: Sequence[str], unit: str) -> None:
    """effects[kind][layer][place], one heat map a kind."""
    with drawing(path, columns=len(effects), size=(4.6 * len(effects), 3.8)) as axes:
        for each, (kind, values) in zip(axes, effects.items(), strict=True):
            heat_map(each, values, "", "layer", f"restored: {kind}; {unit}", centred=True)
            each.set_xticks(range(len(places)), places, rotation=30, ha="right", fontsize=8)
