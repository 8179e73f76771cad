"""One look for all pictures: the colours of Okabe and Ito, which the colour-blind tell apart, markers besides, legends above the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, GREY, INK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
    "#7A858D",
    "#1D2429",
)
OURS: dict[str, Any] = {"color": BLUE, "marker": "o"}
CRYPTEN: dict[str, Any] = {"color": VERMILION, "marker": "s"}
PUBLISHED: dict[str, Any] = {"color": GREY, "marker": "D"}
EARLIER: dict[str, Any] = {"color": ORANGE, "marker": "^"}
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
MARKERS = ("o", "s", "D", "^", "v")
WIDTH, DPI, FONT, SMALL = 6.4, 120, 10.0, 9.0


def picture(alt: str, height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure, its panels in reading order; `alt` says in words what is to be seen."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.set_label(alt)
    panels = list(figure.subplots(rows, columns, squeeze=False, **more).flat)
    for one in panels:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color("#8A969E")
        one.tick_params(labelsize=FONT, color="#8A969E")
        one.xaxis.label.set_fontsize(FONT)
        one.yaxis.label.set_fontsize(FONT)
        one.title.set_fontsize(FONT)
    return figure, panels


def plain(value: float, _: object = None) -> str:
    """Of an axis: digits, no powers."""
    return f"{value:g}"


def log(axis: Any) -> None:
    """A logarithmic axis of 1, 2, 5, 10: labelled where one decade or two are shown, otherwise the decades alone."""
    one = axis.axes
    (one.set_xscale if axis is one.xaxis else one.set_yscale)("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 250 * low else (1,), numticks=20))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def steps(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with these very values as its ticks."""
    one = axis.axes
    (one.set_xscale if axis is one.xaxis else one.set_yscale)("log")
    axis.set_ticks(list(values), [plain(value) for value in values])
    axis.set_ticks([], minor=True)


def whole(axis: Any) -> None:
    """Ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True))


def grid(axes: Axes, which: str) -> None:
    """Light lines to read values by."""
    axes.grid(axis=which, color="#E3E8EB", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def legend(figure: Figure, axes: Axes | Sequence[Axes], columns: int = 3) -> None:
    """Every label of these panels once, above all of them, so that no data are covered."""
    found: dict[str, Any] = {}
    for one in [axes] if isinstance(axes, Axes) else axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns, frameon=False, fontsize=SMALL)
