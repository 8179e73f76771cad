"""One report from results: sections of text, tables and pictures, as Markdown, as one HTML page, and README's block."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import keep, plots
from benchmarks.output import markdown, provenance, source, table
from benchmarks.schema import Result
from benchmarks.sections import Table, tables
from protocols.errors import ConfigError

BEGIN, END = "<!-- figures: written by `python -m benchmarks report --readme` -->", "<!-- /figures -->"
DOCS = Path("docs/figures.md")
STYLE = """
:root { --page: #fff; --ink: #1d2429; --soft: #57636c; --line: #d6dce0; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
body { max-width: 920px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0.2rem; } h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--line); } p.note { color: var(--soft); }
p, summary { overflow-wrap: anywhere; } code { background: #f1f4f6; padding: 0 0.2rem; } a { color: #00588f; }
/* A table that is wider than the page scrolls in its own box; the shadow at an edge says that there is more beyond it. */
div.wide { overflow-x: auto; margin: 0.9rem 0; background:
  linear-gradient(90deg, var(--page) 40%, transparent) 0 / 3rem 100% no-repeat local,
  linear-gradient(270deg, var(--page) 40%, transparent) 100% / 3rem 100% no-repeat local,
  linear-gradient(90deg, rgb(0 0 0 / 0.22), transparent) 0 / 0.9rem 100% no-repeat scroll,
  linear-gradient(270deg, rgb(0 0 0 / 0.22), transparent) 100% / 0.9rem 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e3e8eb; vertical-align: bottom; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 10rem; }
th { border-bottom: 2px solid #8a969e; font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td:first-child { white-space: normal; min-width: 8rem; } td[colspan] { position: static; background: none; padding-top: 0.9rem; }
figure { margin: 1rem 0; } img { width: 100%; max-width: 760px; height: auto; display: block; }
pre { width: max-content; font-size: 12px; } summary { cursor: pointer; }
"""


@dataclass
class Section:
    """A heading, paragraphs, tables, and the name of a picture with its figure, whose label is the text for those who do not see it."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    name: str = ""
    figure: Figure | None = None

    @property
    def alt(self) -> str:
        """The picture in words."""
        return str(self.figure.get_label()) if self.figure is not None else ""


def sections(results: Sequence[Result]) -> list[Section]:
    """What the results hold something for; the last one says where everything is from."""
    found = []
    for title, name, text, shown in tables(results):
        figure = plots.FIGURES[name](results) if name else None
        shown = [(head, lines) for head, lines in shown if lines]
        if shown or figure:
            found.append(Section(title, [text] if text else [], shown, name, figure))
    last = Section("Where this is from", [source(results)])
    for result in results:
        state = "" if result.complete else "**Unfinished**: what had been measured is here. "
        last.text.append(f"**{result.scenario}**: {state}{provenance(result)}")
        last.text += [f"Absent: {absent.what}: {absent.reason}" for absent in result.absent]
    return [*found, last]


def as_markdown(found: Sequence[Section], pictures: str = "") -> str:
    """`pictures`: the directory of the PNG files, as seen from the page; without it none are shown."""
    parts = [
        "# Figures\n\nWritten by `python -m benchmarks report` from results, not by hand; nothing is entered but what is marked as "
        "published. [`benchmarks/README.md`](../benchmarks/README.md) says how everything is counted.\n"
    ]
    for section in found:
        parts.append(f"## {section.title}\n")
        if section.figure and pictures:
            parts.append(f"![{section.alt}]({pictures}/{section.name}.png)\n")
        parts += [f"{text}\n" for text in section.text]
        parts += [table(head, lines) for head, lines in section.tables]
    return "\n".join(parts)


def _png(figure: Figure, of: str = "") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None, "Source": of})
    return buffer.getvalue()


def _inline(text: str) -> str:
    """Markdown's `code` and **bold** in HTML."""
    for mark, tag in (("**", "b"), ("`", "code")):
        pieces = (html.escape(text) if mark == "**" else text).split(mark)
        text = "".join(f"<{tag}>{piece}</{tag}>" if place % 2 else piece for place, piece in enumerate(pieces))
    return text


LONG = 26
"""A cell of more characters is broken into lines."""


def _cells(line: Sequence[object]) -> str:
    """One line of a table; a heading within it, which has nothing beside it, takes the whole width."""
    if len(line) > 2 and not any(str(cell) for cell in line[1:]):
        return f'<td colspan="{len(line)}">{_inline(str(line[0]))}</td>'
    return "".join(f"<td{' class=long' if len(str(cell)) > LONG else ''}>{_inline(str(cell))}</td>" for cell in line)


def as_html(found: Sequence[Section], results: Sequence[Result]) -> str:
    """One page that needs nothing else: pictures are in it; every result's own tables fold out at the end."""

    def of_table(title: str, head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
        top = "".join(f'<th scope="col">{_inline(str(cell))}</th>' for cell in head)
        body = "".join(f"<tr>{_cells(line)}</tr>\n" for line in lines)
        table = f"<table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"
        return f'<div class="wide" tabindex="0" role="region" aria-label="Table: {html.escape(title)}">{table}</div>\n'

    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>privinf benchmarks</title><style>{STYLE}</style></head><body><h1>privinf benchmarks</h1>",
        '<p class="note">Written by <code>python -m benchmarks report</code> from measured results; nothing is entered by hand but '
        "what is marked as published. benchmarks/README.md says how everything is counted.</p>",
    ]
    for section in found:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{_inline(text)}</p>" for text in section.text]
        if section.figure:
            data = base64.b64encode(_png(section.figure)).decode()
            parts.append(f'<figure><img alt="{html.escape(section.alt)}" src="data:image/png;base64,{data}"></figure>')
        parts += [of_table(section.title, head, lines) for head, lines in section.tables]
    for result in results:
        folded = html.escape(markdown(result))
        parts.append(f"<details><summary>{html.escape(result.scenario)}: all tables</summary>")
        parts.append(f'<div class="wide" tabindex="0"><pre>{folded}</pre></div></details>')
    return "\n".join([*parts, "</body></html>\n"])


def block(found: Sequence[Section], pictures: str) -> str:
    """What stands between README's markers: the picture and the table of the headline, and where they are from."""
    first = next((s for s in found if s.title == "Headline"), None)
    parts = []
    if first and first.figure:
        parts.append(f"![{first.alt}]({pictures}/{first.name}.png)\n")
    if first and first.tables:
        parts.append(table(*first.tables[0]))
    return "\n".join([*parts, *(f"{text}\n" for text in (first.text if first else ())), f"{found[-1].text[0]}\n"])


def in_readme(text: str, written: str, name: str = "README") -> str:
    """The text with the block between its markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{name} has no place for figures", remedy=f"put the lines {BEGIN} and {END} where they belong")
    return f"{text.split(BEGIN)[0]}{BEGIN}\n\n{written}\n{END}{text.split(END)[1]}"


def write(
    results: Sequence[Result],
    *,
    out: Path | None = None,
    html: Path | None = None,
    readme: Path | None = None,
    kept: Path | None = None,
) -> None:
    """The files that were asked for; pictures of a Markdown page lie in a directory of its name. ConfigError where it cannot be.

    All are of what `kept` holds, whether it is written or not, so that the same files come from it again.
    """
    small = keep.trimmed(results)
    found, of = sections(small), keep.fingerprint(small)
    pictures = (out or DOCS).with_suffix("")
    try:
        if readme is not None:  # the one that may be refused comes first
            shown = pictures.relative_to(readme.parent) if pictures.is_relative_to(readme.parent) else DOCS.with_suffix("")
            readme.write_text(in_readme(readme.read_text("utf-8"), block(found, shown.as_posix()), str(readme)), "utf-8")
        if out is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            for name in plots.FIGURES:
                (pictures / f"{name}.png").unlink(missing_ok=True)
            for section in found:
                if section.figure:
                    (pictures / f"{section.name}.png").write_bytes(_png(section.figure, of))
            out.write_text(as_markdown(found, pictures.name), "utf-8")
        if kept is not None:
            kept.write_bytes(keep.encode(small))
        if html is not None:
            html.write_text(as_html(found, results), "utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None


def write_docs(results: Sequence[Result], root: Path) -> None:
    """README's block, `docs/figures.md`, its pictures, and the results that they are from."""
    page = root / DOCS
    page.with_suffix("").mkdir(parents=True, exist_ok=True)
    write(results, out=page, readme=root / "README.md", kept=page.with_suffix("") / "results.json")
