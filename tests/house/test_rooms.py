"""The house keeps its form: no circle of imports, not even for types; no file, function or class that is too large to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import privinf

ROOT = Path(privinf.__file__).parent.parent
SOURCES = sorted(path.relative_to(ROOT) for room in ("privinf", "protocols") for path in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse((ROOT / path).read_text()) for path in SOURCES}

MOST_LINES, MOST_OF_A_FUNCTION, MOST_ATTRIBUTES = 400, 60, 12


def module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Who imports whom, wherever the import stands: at the top, in a function, or for types alone."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [each if (each := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names]
            found[name] |= {each for each in names if each in modules and each != name}
    return found


def circles(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """Modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen, rest = set[str](), [start]
        while rest:
            for each in arrows[rest.pop()] - seen:
                seen.add(each)
                rest.append(each)
        return seen

    reach = {name: reached(name) for name in arrows}
    found = {frozenset(each for each in reach[name] if name in reach[each]) for name in arrows if name in reach[name]}
    return [set(circle) for circle in found]


def attributes(kind: ast.ClassDef) -> set[str]:
    """What objects of a class carry: its fields, and whatever its methods set on `self`."""
    found = {
        each.target.id
        for each in kind.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and "ClassVar" not in ast.unparse(each.annotation)
    }
    for method in kind.body:
        for node in ast.walk(method) if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) else ():
            if isinstance(node, ast.Assign):
                targets = node.targets
            else:
                targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
            for target in [each for one in targets for each in (one.elts if isinstance(one, ast.Tuple) else [one])]:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                    found.add(target.attr)
    return found


def too_large(path: Path) -> Iterator[str]:
    """What of a file is; a class may say in its docstring why it has that many attributes."""
    if (ROOT / path).read_text().count("\n") > MOST_LINES:
        yield str(path)
    for node in ast.walk(TREES[path]):
        grown = False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            grown = node.end_lineno - node.lineno >= MOST_OF_A_FUNCTION
        elif isinstance(node, ast.ClassDef):
            grown = len(attributes(node)) > MOST_ATTRIBUTES and "attributes" not in (ast.get_docstring(node) or "")
        if grown and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{path}: {node.name}"


def test_no_circle_of_imports() -> None:
    assert circles(imports({module(path): tree for path, tree in TREES.items()})) == []


def test_nothing_is_too_large() -> None:
    found = {each for path in SOURCES for each in too_large(path)}
    assert found == set(), "too large: make it smaller, or of a class say why it has so many attributes"


@pytest.mark.parametrize("line", ["import b", "from b import x", "if TYPE_CHECKING:\n    from b import x", "def f():\n    import b"])
def test_a_circle_is_found(line: str) -> None:
    modules = {"a": ast.parse(line), "b": ast.parse("from c import y"), "c": ast.parse("import a"), "d": ast.parse("import a")}
    assert circles(imports(modules)) == [{"a", "b", "c"}]


def test_attributes_are_counted_wherever_they_are_born() -> None:
    methods = "    def f(self):\n        self.a, self.b = 1, 2\n        if self.a:\n            self.c: int = 3"
    source = f"class A:\n    x: int\n    k: ClassVar[int]\n{methods}"
    kind = ast.parse(source).body[0]
    assert isinstance(kind, ast.ClassDef) and attributes(kind) == {"x", "a", "b", "c"}
