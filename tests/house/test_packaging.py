"""What is installed, what importing it costs, and the rules between the rooms."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import privinf

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("privinf", "protocols")
# where the name that is imported is not the one that is installed
DISTRIBUTIONS = {
    "nacl": "pynacl",
    "yaml": "PyYAML",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
}
FOR_OTHERS = {"sklearn"}  # required so that crypten's own requirement of that name can be built


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def setup_lines(option: str, section: str = "options") -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser[section][option].split()


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    ["import privinf; privinf.PrivinfError, privinf.__version__", "from privinf.cli.app import main; assert main(['--help']) == 0"],
    ids=["import", "help"],
)
def test_torch_and_crypten_are_loaded_only_when_they_are_needed(code: str) -> None:
    heavy = "('torch', 'crypten', 'numpy', 'pydantic', 'matplotlib', 'cryptography')"
    assert in_a_fresh_process(f"{code}\nimport sys; print([name for name in {heavy} if name in sys.modules])").splitlines()[-1] == "[]"


def test_no_party_waits_for_numba_to_be_imported() -> None:
    parties = ("privinf.client.client", "privinf.server.server", "privinf.dealer.dealer", "privinf.local.session")
    code = f"import sys, {', '.join(parties)}; print('numba' in sys.modules)"
    assert in_a_fresh_process(code).splitlines()[-1] == "False"


def test_every_public_name_is_there() -> None:
    for name in privinf.__all__:
        assert getattr(privinf, name) is not None
    assert set(privinf.__all__) <= set(dir(privinf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = privinf.nothing  # type: ignore[attr-defined]


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [name for name in privinf.__all__ if name not in page and name != "__version__"] == []


def test_the_version_is_said_once() -> None:
    assert setup_lines("version", "metadata") == ["attr:", "privinf.version.VERSION"]


def test_requirements_are_what_is_imported() -> None:
    ours = {*PACKAGES, "__future__"}
    found = {name.split(".")[0] for path in sources() for name in imports(path)} - ours - set(sys.stdlib_module_names)
    required, *extras = (
        {line.split(">")[0].split("=")[0] for line in setup_lines(*where)}
        for where in (("install_requires",), ("ray", "options.extras_require"), ("gateway", "options.extras_require"))
    )
    assert {DISTRIBUTIONS.get(name, name) for name in found} == (required - FOR_OTHERS).union(*extras)


def test_no_requirement_names_a_build_or_a_host() -> None:
    for name in ("setup.cfg", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text("utf-8")
        assert "+cpu" not in text and "index-url" not in text and "://" not in text, name


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    """By name: the lists are of what the packages could be tempted to use."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    calls = {"eval", "exec", "compile", "__import__"}
    attributes = {
        ("torch", "load"),
        ("yaml", "load"),
        ("yaml", "unsafe_load"),
        ("yaml", "full_load"),
        ("pandas", "read_pickle"),
        ("jit", "load"),
    }
    for path in sources():
        assert not {name.split(".")[0] for name in imports(path)} & modules, path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
                assert (name, node.attr) not in attributes, f"{path}:{node.lineno}"
                assert node.attr != "allow_pickle", f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


def test_masks_come_from_no_insecure_generator() -> None:
    banned = ("random", "numpy.random", "torch.random")
    for path in sources():
        room = path.relative_to(ROOT).parts
        if room[0] != "protocols" and room[:2] != ("privinf", "party"):
            continue
        for name in imports(path):
            assert not any(name == ban or name.startswith(f"{ban}.") for ban in banned), f"{path} imports {name}"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("torch", "np", "numpy"):
                assert not node.attr.startswith(("rand", "normal", "bernoulli", "multinomial", "manual_seed")), f"{path}:{node.lineno}"


def test_the_import_rules_between_the_rooms_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_our_benchmarks_win_from_the_root() -> None:
    """CrypTen's wheel installs a package of that name, and `python -m benchmarks` must not find it."""
    place = in_a_fresh_process("import importlib.util; print(importlib.util.find_spec('tests').origin)")
    assert place.strip() == str(ROOT / "tests" / "__init__.py")
    if (ROOT / "benchmarks" / "__init__.py").exists():
        place = in_a_fresh_process("import importlib.util; print(importlib.util.find_spec('benchmarks').origin)")
        assert place.strip() == str(ROOT / "benchmarks" / "__init__.py")


def test_the_wheel_holds_the_packages_whole_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "benchmarks", "tests", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("privinf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, metadata.split("/")[0]}
    expected = {str(path.relative_to(source)) for package in PACKAGES for path in (source / package).rglob("*") if path.is_file()}
    assert expected - names == set()
    assert "privinf/py.typed" in names and "protocols/py.typed" in names
    assert f"Version: {privinf.__version__}" in text and "Apache-2.0" in text
