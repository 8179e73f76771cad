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


def count_by(*axes: Any) -> None:
    """Ticks at whole numbers alone: of layers, heads and steps there are no halves."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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
        count_by(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel("cross entropy, nats per token")
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside upper left", ncols=3, frameon=False)  # above the data


def heat_map(axes: Any, values: Rows, x: str, y: str, title: str, top: float = 1.0, centred: bool = False) -> Any:
    """values[row][column], rows from below, colours from 0 to `top`; `centred` from -top. The image, for a scale of its colours."""
    limits = {"vmin": -top, "vmax": top, "cmap": "RdBu_r"} if centred else {"vmin": 0, "vmax": top, "cmap": "viridis"}
    image = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **limits)
    count_by(axes.xaxis, axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    return image


def write_values(axes: Any, image: Any, values: Rows, digits: int = 2) -> None:
    """Each cell's number, dark on light colours and light on dark ones; none where they would not fit."""
    if len(values) > 24 or any(len(row) > 16 for row in values):
        return
    for row, numbers in enumerate(values):
        for column, number in enumerate(numbers):
            red, green, blue, _ = image.cmap(image.norm(number))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"
            text = f"{round(number, digits) + 0.0:.{digits}f}"
            text = text.replace("0.", ".", 1) if abs(number) < 1 else text
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)


def plot_entropy_end(path: Path, entropy: Rows, e_max: float) -> None:
    """entropy[layer][head] in nats."""
    with drawing(path, size=(6, 0.35 * len(entropy) + 2)) as axes:
        parts = [[v / e_max for v in row] for row in entropy]
        image = heat_map(axes, parts, "head", "layer", "entropy, as a part of log T")
        axes.figure.colorbar(image, ax=axes)
        write_values(axes, image, parts)


def plot_entropy_over_training(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every head's entropy by step, and the fractions of heads in overload and collapse."""
    steps = [row["step"] for row in rows]
    heads = [
        [row["entropy"][layer][head] / row["entropy_max"] for row in rows]
        for layer in range(len(rows[0]["entropy"]))
        for head in range(len(rows[0]["entropy"][0]))
    ]
    with drawing(path, columns=2, size=(11, 4.5)) as (left, right):
        image = heat_map(left, heads, "step", "head, from the first layer up", "entropy, as a part of log T")
        left.figure.colorbar(image, ax=left)
        ticks = sorted({0, len(steps) // 2, len(steps) - 1})
        left.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
        for name in ("overload", "collapse"):
            right.plot(steps, [row[name] for row in rows], "o-", label=name, markersize=3)
        right.set_ylim(-0.02, 1.02)
        count_by(right.xaxis)
        right.set_xlabel("step")
        right.set_ylabel("fraction of heads")
        right.grid(alpha=0.3)
        right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)  # above the data


def plot_bars(path: Path, labels: Sequence[str], values: Sequence[float], ylabel: str, title: str) -> None:
    """Bars with a label each."""
    with drawing(path, size=(7, 3.4)) as axes:
        axes.bar(range(len(values)), values)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylabel(ylabel)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)


def plot_tracing(path: Path, effects: dict[str, Rows], places: Sequence[str], unit: str) -> None:
    """effects[kind][layer][place], one heat map a kind, all with the same colours, so that they compare; the numbers are in the cells."""
    top = max((abs(v) for values in effects.values() for row in values for v in row), default=1.0) or 1.0
    with drawing(path, columns=len(effects), size=(3.0 * len(effects), 3.6)) as axes:
        for each, (kind, values) in zip(axes, effects.items(), strict=True):
            image = heat_map(each, values, "", "layer" if each is axes[0] else "", f"restored: {kind}", top, centred=True)
            write_values(each, image, values, 3)
            each.set_yticks(range(len(values)))
            each.set_xticks(range(len(places)), places, rotation=40, ha="right", fontsize=9)
        axes[0].figure.colorbar(image, ax=axes, label=unit)
