"""The drawing of the house against what the modules import, and the walk through it against the files and functions that are there."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()

Arrow = tuple[str, str]


def room(module: str) -> str:
    top, *rest = module.split(".")
    return rest[0] if top == "privinf" and rest else top


def imports() -> set[Arrow]:
    """Between rooms; modules beside them, which all may use, are left out."""
    graph = grimp.build_graph("privinf", "protocols", cache_dir=None)
    found = {(room(m), room(n)) for m in graph.modules for n in graph.find_modules_directly_imported_by(m)}
    beside = {path.stem for path in (ROOT / "privinf").glob("*.py")} - {name for arrow in drawn() for name in arrow}
    return {(a, b) for a, b in found if a != b and not {a, b} & {*beside, "privinf"}}


def reached(start: str, arrows: set[Arrow]) -> set[str]:
    found = {b for a, b in arrows if a == start}
    return found.union(*(reached(b, arrows) for b in found))


def drawn() -> set[Arrow]:
    """The arrows of the page's second drawing."""
    drawing = re.findall(r"```mermaid\n(.*?)```", PAGE, re.S)[1]
    return {(a, b) for a, b in re.findall(r"^    (\w+) --> (\w+)$", drawing, re.M)}


def test_the_drawing_is_what_the_rooms_import() -> None:
    """Each arrow is an import, no arrow follows from others, and every import follows from the arrows."""
    real, arrows = imports(), drawn()
    assert arrows <= real
    for a, b in arrows:
        assert b not in reached(a, arrows - {(a, b)}), f"{a} --> {b} follows from other arrows"
    assert {(a, b) for a, b in real if b not in reached(a, arrows)} == set()


def test_the_drawing_runs_down_the_layers() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:layers"]["layers"].split("\n")
    level = {
        name.strip().removeprefix("privinf."): number for number, layer in enumerate(layers) for name in layer.split("|") if name.strip()
    }
    arrows = drawn()
    assert set(level) <= {name for arrow in arrows for name in arrow}
    assert [(a, b) for a, b in arrows if a in level and b in level and level[a] >= level[b]] == []


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


def test_the_walk_names_what_is_there() -> None:
    rows = re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \| ([^|]+) \|$", PAGE, re.M)
    assert len(rows) == PAGE.count(".py` |") >= 25
    for path, names in rows:
        assert set(re.findall(r"`([\w.]+)`", names)) <= defined(ROOT / path), path
    for path in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
