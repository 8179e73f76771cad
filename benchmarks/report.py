"""One report from results: sections of text, tables and pictures, as Markdown, as one HTML page, and README's headline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.output import markdown, provenance, table
from benchmarks.schema import Result
from benchmarks.sections import Table, tables
from protocols.errors import ConfigError

BEGIN, END = "<!-- figures: written by `python -m benchmarks report --readme` -->", "<!-- /figures -->"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2429; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0.2rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d6dce0; } p.note { color: #57636c; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 0.8rem 0; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #e3e8eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #aab4bb; }
img { max-width: 100%; height: auto; } code { background: #f1f4f6; padding: 0 0.2rem; overflow-wrap: anywhere; }
"""


@dataclass
class Section:
    """A heading, paragraphs, tables, and the name of a picture with its figure."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    name: str = ""
    figure: Figure | None = None


def sections(results: Sequence[Result]) -> list[Section]:
    """What the results hold something for; the last one says where everything is from."""
    found = []
    for title, name, text, shown in tables(results):
        figure = plots.FIGURES[name](results) if name else None
        shown = [(head, lines) for head, lines in shown if lines]
        if shown or figure:
            found.append(Section(title, [text] if text else [], shown, name, figure))
    sources = Section("Where this is from")
    for result in results:
        state = "" if result.complete else "**Unfinished**: what had been measured is here. "
        sources.text.append(f"**{result.scenario}**: {state}{provenance(result)}")
        sources.text += [f"Absent: {absent.what}: {absent.reason}" for absent in result.absent]
    return [*found, sources]


def as_markdown(found: Sequence[Section], pictures: str = "") -> str:
    """`pictures`: the directory of the PNG files, as seen from the page; without it none are shown."""
    parts = ["# Figures\n\nWritten by `python -m benchmarks report`, not by hand; `benchmarks/README.md` says how everything is counted.\n"]
    for section in found:
        parts.append(f"## {section.title}\n")
        if section.figure and pictures:
            parts.append(f"![{section.title}]({pictures}/{section.name}.png)\n")
        parts += [f"{text}\n" for text in section.text]
        parts += [table(head, lines) for head, lines in section.tables]
    return "\n".join(parts)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _inline(text: str) -> str:
    """Markdown's `code` and **bold** in HTML."""
    for mark, tag in (("**", "b"), ("`", "code")):
        pieces = (html.escape(text) if mark == "**" else text).split(mark)
        text = "".join(f"<{tag}>{piece}</{tag}>" if place % 2 else piece for place, piece in enumerate(pieces))
    return text


def as_html(found: Sequence[Section], results: Sequence[Result]) -> str:
    """One page that needs nothing else: pictures are in it; every result's own tables fold out at the end."""

    def of_table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
        top = "".join(f"<th>{_inline(str(cell))}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_inline(str(cell))}</td>" for cell in line) + "</tr>\n" for line in lines)
        return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n'

    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>privinf benchmarks</title><style>{STYLE}</style></head><body><h1>privinf benchmarks</h1>",
        '<p class="note">Written by <code>python -m benchmarks report</code> from measured results; nothing is entered by hand but '
        "what is marked as published. benchmarks/README.md says how everything is counted.</p>",
    ]
    for section in found:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{_inline(text)}</p>" for text in section.text]
        if section.figure:
            data = base64.b64encode(_png(section.figure)).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
        parts += [of_table(head, lines) for head, lines in section.tables]
    for result in results:
        folded = html.escape(markdown(result))
        parts.append(f"<details><summary>{html.escape(result.scenario)}: all tables</summary><pre>{folded}</pre></details>")
    return "\n".join([*parts, "</body></html>\n"])


def write(results: Sequence[Result], *, out: Path | None = None, html: Path | None = None, readme: Path | None = None) -> None:
    """The files that were asked for; pictures of a Markdown page lie in a directory of its name. ConfigError where it cannot be."""
    found = sections(results)
    try:
        if out is not None:
            pictures = out.with_suffix("")
            pictures.mkdir(parents=True, exist_ok=True)
            for section in found:
                if section.figure:
                    (pictures / f"{section.name}.png").write_bytes(_png(section.figure))
            out.write_text(as_markdown(found, pictures.name), "utf-8")
        if html is not None:
            html.write_text(as_html(found, results), "utf-8")
        if readme is not None:
            text = readme.read_text("utf-8")
            if text.count(BEGIN) != 1 or text.count(END) != 1:
                raise ConfigError(f"{readme} has no place for figures", remedy=f"put the lines {BEGIN} and {END} where they belong")
            before, rest = text.split(BEGIN)
            headline = next((s for s in found if s.title == "Headline"), None)
            block = table(*headline.tables[0]) if headline and headline.tables else ""
            readme.write_text(f"{before}{BEGIN}\n\n{block}\n{END}{rest.split(END)[1]}", "utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None
