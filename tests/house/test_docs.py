"""The documentation: links lead somewhere, every failure is in the page of them as it is, the notebook runs, the site is whole."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privinf.gateway.wire import VERDICTS
from protocols.errors import KINDS, Code

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/README.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
WILD = "\x00"


def text_of(page: Path) -> str:
    """Without what stands in fences, which is no link and no heading."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    seen, found = Counter[str](), set[str]()
    for title in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_page_is_in_the_sites_list_and_the_index() -> None:
    listed = set(re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    index = set(LINK.findall((ROOT / "docs" / "index.md").read_text("utf-8")))
    own = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert own <= listed and own - {"index.md"} <= index


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed; `make docs` installs it")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# ---- failures


def rows() -> dict[str, list[str]]:
    """The table of failures, by code."""
    lines = [line for line in (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(each) == 5 for each in cells), cells
    found = {each[0].strip("` "): each[1:] for each in cells}
    assert len(found) == len(cells)
    return found


def test_every_failure_is_told_with_its_ends() -> None:
    assert set(rows()) == {str(code) for code in Code}
    for name, (code, status, _, remedy) in rows().items():
        kind = KINDS[Code(name)]
        assert (int(code), int(status)) == (kind.exit_code, VERDICTS[Code(name)].status), name
        assert len(remedy) > 20, name


def said(tree: ast.AST) -> Iterator[str]:
    """Texts in a module, with a wild card for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else WILD for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_lines_are_those_that_are_said() -> None:
    """Each quoted line, up to its remedy, is a text of the packages, with something in the places that are filled in."""
    texts = {
        text for room in ("privinf", "protocols") for path in (ROOT / room).rglob("*.py") for text in said(ast.parse(path.read_text()))
    }
    patterns = [re.compile(".+".join(map(re.escape, text.split(WILD)))) for text in texts if len(text.replace(WILD, "")) >= 8]
    for name, (_, _, lines, _) in rows().items():
        for line in re.findall(r"`([^`]+)`", lines):
            told = line.split(";")[0]
            assert any(pattern.fullmatch(told) for pattern in patterns), f"{name}: nobody says {told!r}"


# ---- the notebook


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, one after the other; on a model that is small."""
    from tests.support import trio as t

    cells = json.loads((ROOT / "docs" / "first-reply.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith('MODEL = "models/pylib"\n') and not any(cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    for cell in [code[0].replace("models/pylib", str(t.checkpoint())), *code[1:]]:
        exec(compile(cell, "first-reply.ipynb", "exec"), names)
    shown = capsys.readouterr().out
    assert "bytes online" in shown and f"{names['counted']['payload']} bytes" in shown and " first\n" in shown
