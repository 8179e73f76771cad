"""What is installed, what importing it costs, and the rules between the rooms."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

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
        for where in (("install_requires",), *((extra, "options.extras_require") for extra in ("ray", "gateway", "training")))
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


def built(tmp_path: Path) -> Path:
    """A wheel, from a copy of the sources."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "benchmarks", "tests", "docs", "models"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("privinf-*.whl")
    return wheel


def test_the_wheel_holds_the_packages_whole_and_the_shipped_model_and_nothing_else(tmp_path: Path) -> None:
    wheel, source = built(tmp_path), tmp_path / "source"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, metadata.split("/")[0]}
    expected = {str(path.relative_to(source)) for package in PACKAGES for path in (source / package).rglob("*") if path.is_file()}
    assert expected - names == set()
    assert "privinf/py.typed" in names and "protocols/py.typed" in names
    assert f"Version: {privinf.__version__}" in text and "Apache-2.0" in text
    model = {f"privinf/pylib/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")}
    assert {name for name in names if name.startswith("privinf/pylib")} == model and wheel.stat().st_size < 10e6


@pytest.mark.slow
def test_an_installed_wheel_shows_what_it_does(tmp_path: Path) -> None:
    """`privinf run` without a model, from a directory with nothing of the checkout in it."""
    with zipfile.ZipFile(built(tmp_path)) as archive:
        archive.extractall(tmp_path / "installed")
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "privinf", "run", "--prompt", "def main(", "--max-new-tokens", "2", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 2


# ---- what is not installed everywhere


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from privinf.cli.app import main
sys.exit(main({words!r}))
"""


def without(absent: set[str], *words: str) -> list[str]:
    """A verb, where these libraries are not."""
    return [sys.executable, "-c", WITHOUT.format(absent=absent, words=list(words))]


@pytest.mark.parametrize(
    ("absent", "words", "extra"),
    [
        ("fastapi", ("gateway", "--demo", "models/pylib"), "gateway"),
        ("matplotlib", ("train", "--variant", "SM", "--output", "never"), "training"),
    ],
)
def test_a_verb_says_which_extra_brings_what_it_needs(absent: str, words: tuple[str, ...], extra: str, tmp_path: Path) -> None:
    done = subprocess.run(without({absent}, *words), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"needs {absent}, which is not installed; pip install 'privinf[{extra}]'" in done.stderr


def test_a_dealer_deals_with_what_its_list_has() -> None:
    """A pass with a dealer in whose process nothing else of what we require can be imported."""
    listed = dealers()
    everything = {re.split("[>=]", line)[0] for name in ("gateway", "training") for line in setup_lines(name, "options.extras_require")}
    everything |= {re.split("[>=]", line)[0] for line in setup_lines("install_requires")}
    assert listed < everything
    modules = {name: module for module, name in DISTRIBUTIONS.items()}
    absent = {modules.get(name, name) for name in everything - listed} - {"pydantic"}
    assert {"crypten", "matplotlib", "fastapi", "tokenizers"} <= absent
    deals(lambda *words: without(absent, *words), ROOT)


def dealers() -> set[str]:
    """The distributions that a dealer asks for."""
    lines = (ROOT / "deploy" / "dealer.txt").read_text("utf-8").splitlines()
    return {re.split("[>=]", line)[0] for line in lines if line[:1] not in "#"}


def deals(command: Callable[..., list[str]], cwd: Path, **environment: str) -> None:
    """A reply with a dealer that is started so."""
    from privinf.client.client import Client
    from privinf.server.server import Server
    from privinf.session.options import Options
    from tests.support import trio as t
    from tests.support.waiting import PATIENCE

    torch.set_num_threads(1)
    words = ("dealer", "--listen", "127.0.0.1:0", "--keys", str(t.keys()), "--cache", str(t.scratch() / "dealer"), "--json")
    here = {**os.environ, **environment}
    dealer = subprocess.Popen(command(*words), cwd=cwd, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert dealer.stdout is not None
        place, options = json.loads(dealer.stdout.readline())["address"], Options(timeout=PATIENCE, cache=t.scratch() / "cache")
        with Server(t.lowered(), listen="127.0.0.1:0", dealer=place, keys=str(t.keys()), options=options) as server:
            client = Client(server.address, dealer=place, keys=str(t.keys()), options=options)
            assert t.is_greedy([1, 2], [token.id for token in client.generate(ids=[1, 2], max_new_tokens=2, ignore_eos=True)])
    finally:
        dealer.terminate()
        dealer.wait(60)


def with_what_they_ask_for(names: set[str]) -> dict[str, Distribution]:
    """The distributions of these names in this environment, and all that these ask for."""
    found: dict[str, Distribution] = {}
    left = set(names)
    while left:
        name = left.pop()
        try:
            each = found[name] = distribution(name)
        except PackageNotFoundError:  # for another platform or Python
            continue
        asked = {re.split(r"[ <>=!~;(\[]", line)[0] for line in each.requires or () if "extra ==" not in line}
        left |= asked - set(found)
    return found


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None or shutil.which("strip") is None, reason="of a CPU build of torch, and with binutils")
def test_a_slim_dealers_environment_is_small_and_deals(tmp_path: Path) -> None:
    """Made of what this environment has of its distributions: below 700 MB once loops are compiled in it, and a reply with it as dealer."""
    made = tmp_path / "venv"
    venv.create(made, symlinks=True)
    (site,) = made.glob("lib/python*/site-packages")
    for each in with_what_they_ask_for(dealers()).values():
        for file in each.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), site / file)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    alone = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["sh", ROOT / "deploy" / "slim.sh", made], env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    python = str(made / "bin" / "python")
    code = "from protocols import kernels; kernels.load(None); print(kernels.status())"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300)
    assert done.stdout == "compiled\n", done.stdout + done.stderr
    deals(lambda *words: [python, "-m", "privinf", *words], tmp_path, PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1")
    assert sum(512 * path.lstat().st_blocks for path in made.rglob("*")) < 700e6
    done = subprocess.run([python, "-m", "privinf", "doctor", "--cache", tmp_path], cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0 and "crypten: not installed, and no dealer needs it" in done.stdout, done.stdout
