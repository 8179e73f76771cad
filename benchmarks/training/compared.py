"""The tables and the picture of docs/architectures.md, from what `architectures` measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchmarks import style
from benchmarks.output import size, table
from benchmarks.training.architectures import FURTHER, PROMPT
from privinf.session.pace import Pace, link_of, on_link
from privinf.trust import DEALER, TWO_PARTY

NEAR, FAR = (f"token at {cached}" for cached in FURTHER)
WALKED = ("mamba2", "ttt")  # further tokens too: none of theirs is replayed
LINKS = ("loopback", "lan", "wan")
LOOKS = dict(zip(("aero", "llama"), ((style.BLUE, "o"), (style.ORANGE, "^")), strict=True))
OTHERS = ((style.GREEN, "s"), (style.VERMILION, "D"), (style.PURPLE, "v"), (style.SKY, "P"), (style.GREY, "X"))


def quality(found: dict[str, Any]) -> str:
    """What each network learned, and what it costs in ordinary inference."""
    rows = []
    for row in found["rows"]:
        stopped = sum(run["diverged"] is not None for run in row["runs"])
        value = f"{row['perplexity']:.2f}" if "perplexity" in row else "diverged"
        if row.get("spread"):
            value += f" ± {row['spread']:.2f}"
        rate = ""
        if "float_tokens_per_s" in row:
            speed, multiple = row["float_tokens_per_s"], row["float_times_first"]
            rate = f"{speed:,.0f} tokens/s" if row is found["rows"][0] else f"× {multiple:.2f}"
        parameters = f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else ""
        rows.append([row["name"], parameters, value, f"{len(row['runs'])}" + (f", {stopped} diverged" if stopped else ""), rate])
    return table(["network", "parameters", "perplexity", "seeds", "float, speed as a multiple"], rows)


def _times(row: dict[str, Any], first: dict[str, Any], value: Callable[[dict[str, Any]], float | None], form: str) -> str:
    """What hangs on the machine: of the first row itself, of others as a multiple of that."""
    mine, base = value(row), value(first)
    if mine is None or base is None:
        return ""
    return form.format(base) if row is first else f"× {mine / base:.2f}"


def cost(found: dict[str, Any]) -> str:
    """What each costs in private with a dealer."""
    rows = []
    for row in _priced(found):
        with_dealer = row["costs"][DEALER]
        prompt, near, far = (with_dealer[name] for name in ("prompt", NEAR, FAR))
        sizes = [size(prompt["online_bytes"]), prompt["rounds"], size(prompt["dealer_bytes"])]
        sizes += [size(near["online_bytes"]), size(far["online_bytes"]), near["rounds"], size(prompt["setup_bytes"])]
        rows.append([row["name"], *sizes])
    head = [f"prompt of {PROMPT}, online", "rounds", "dealer", f"{NEAR}, online", FAR, "rounds", "set-up"]
    return table(["network", *head], rows)


def times(found: dict[str, Any]) -> str:
    """Seconds of a prompt and of a token with a dealer, as `explain --link` predicts them by this machine's pace, and measured."""
    pace, rows = Pace.checked(found["pace"]), _priced(found)
    first = rows[0] if rows else {}

    def predicted(row: dict[str, Any], what: str, link: str) -> float:
        total = row["costs"][DEALER][what]
        computed = pace.walked.of(total) if what == "prompt" else pace.token(total, tapes=row["family"] not in WALKED)
        return computed + on_link(total, link_of(link))

    asked = [(what, link) for link in LINKS for what in ("prompt", NEAR)]
    measured = [what for what in ("prompt", "token") if any("seconds" in row for row in rows)]
    told = []
    for row in rows:
        cells = [_times(row, first, lambda each, of=of: predicted(each, *of), "{:.3g} s") for of in asked]  # type: ignore[misc]
        cells += [_times(row, first, lambda each, of=what: each.get("seconds", {}).get(of), "{:.3g} s") for what in measured]  # type: ignore[misc]
        told.append([row["name"], *cells])
    head = [f"{what}, {link}" for what, link in asked] + [f"{what}, measured" for what in measured]
    return table(["network", *head], told)


def alone(found: dict[str, Any]) -> str:
    """What each costs where server and client are alone."""
    rows = []
    for row in _priced(found):
        prompt, near, far = (row["costs"][TWO_PARTY][name] for name in ("prompt", NEAR, FAR))
        sizes = [size(each[name]) for each in (prompt, near, far) for name in ("online_bytes", "offline_bytes")]
        rows.append([row["name"], *sizes, size(prompt["setup_bytes"])])
    head = [f"{name}, {phase}" for name in (f"prompt of {PROMPT}", NEAR, FAR) for phase in ("online", "offline")]
    return table(["network", *head, "set-up"], rows)


def _priced(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found["rows"] if "costs" in row]


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, perplexity) that no other is at least as good as in both."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def picture(found: dict[str, Any]) -> Figure | None:
    """Perplexity against all bytes of a prompt with a dealer, with the line of those that nothing beats."""
    points = []
    for row in _priced(found):
        if row["steps"] != found["steps"]:
            continue  # what learned from less text is of another picture
        total = row["costs"][DEALER]["prompt"]
        sent = sum(total[name] for name in ("online_bytes", "dealer_bytes", "peer_offline_bytes"))
        points.append((sent / 1e6, row["perplexity"], row["name"].replace("`", ""), row["family"]))
    if not points:
        return None
    told = "; ".join(f"{name}: {x:.3g} MB, {y:.1f}" for x, y, name, _ in sorted(points))
    figure, (axes,) = style.picture(f"Held-out perplexity against bytes of a private prompt of {PROMPT} tokens. {told}.", 5.2)
    line = front([point[:2] for point in points])
    axes.step(
        [x for x, _ in line], [y for _, y in line], where="post", color=style.GREY, linewidth=1, label="nothing is cheaper and better"
    )
    more = iter(OTHERS)
    for family in dict.fromkeys(point[3] for point in points):
        colour, marker = LOOKS.get(family) or next(more)
        mine = [point for point in points if point[3] == family]
        axes.plot([x for x, *_ in mine], [y for _, y, *_ in mine], linestyle="", color=colour, marker=marker, markersize=7, label=family)
        for x, y, name, _ in mine:
            short = name.partition(": ")[2] or name
            axes.annotate(short, (x, y), xytext=(6, 3), textcoords="offset points", fontsize=style.SMALL - 2)
    style.log(axes.xaxis)
    axes.set_xlim(axes.get_xlim()[0] / 1.2, axes.get_xlim()[1] * 2.2)
    axes.set_xlabel(f"bytes of a prompt of {PROMPT}, all parties, the dealer's included, MB (logarithmic)", fontsize=style.FONT)
    axes.set_ylabel("held-out perplexity", fontsize=style.FONT)
    style.grid(axes, "both")
    style.legend(figure, axes, 3)
    return figure
