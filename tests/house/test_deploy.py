"""What `deploy/` holds fits the command line and the formats' own rules; nothing of it is started here."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import venv as venvs
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from privinf.cli import app as cli
from privinf.cli.config import options_of
from privinf.cli.verbs import Invocation, load_verb
from privinf.transport.keys import load_credentials
from tests.support.waiting import PATIENCE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNWIND_S = 5.0
"""What a party may need beyond its drain, before it ends by itself."""
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def parse(words: list[str]) -> None:
    """Reads a command line as `privinf` would, and runs nothing."""
    context: Any = typer.Context(typer.main.get_command(cli.root), info_name="privinf", obj=Invocation())
    command = load_verb(words[0])
    rest = words[1:]
    while getattr(command, "commands", None):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[0], list(rest), parent=context)


COMPOSE = [("compose.yaml", ("dealer",)), ("compose.two-party.yaml", ())]
"""The files, and who is in each beside server and gateway."""


@pytest.mark.parametrize(("file", "third"), COMPOSE)
def test_the_compose_file(file: str, third: tuple[str, ...]) -> None:
    document = yaml.safe_load((DEPLOY / file).read_text("utf-8"))
    assert set(document["services"]) == {"keys", "server", "gateway", *third}
    for name, service in document["services"].items():
        if name != "keys":
            parse(service["command"])
        if "--drain" in service["command"]:
            drain = float(service["command"][service["command"].index("--drain") + 1])
            assert 0 < drain + UNWIND_S < float(service["stop_grace_period"].removesuffix("s"))
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert set(service.get("networks", ())) <= set(document["networks"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in document["volumes"] or (DEPLOY / source).is_dir()
        assert set(service.get("depends_on", ())) <= set(document["services"])
    assert document["services"]["gateway"]["ports"] == ["127.0.0.1:8080:8080"]
    assert all("outside" not in document["services"][name]["networks"] for name in ("server", *third))
    assert all("to-server" not in document["services"][name]["networks"] for name in third)


@pytest.mark.parametrize(("file", "third"), COMPOSE)
def test_each_container_has_its_own_bundle_and_none_the_cas_key(tmp_path: Path, file: str, third: tuple[str, ...]) -> None:
    """The service that makes the keys is run as it stands, on directories in place of its volumes; what each party mounts is looked at."""
    services = yaml.safe_load((DEPLOY / file).read_text("utf-8"))["services"]
    volumes = {source: tmp_path / target.lstrip("/") for source, target in (volume.split(":") for volume in services["keys"]["volumes"])}
    for path in (*volumes.values(), tmp_path / "bin"):
        path.mkdir(parents=True)
    (tmp_path / "bin" / "privinf").write_text(f'#!/bin/sh\nexec {sys.executable} -m privinf "$@"\n')
    (tmp_path / "bin" / "privinf").chmod(0o755)
    (script,) = services["keys"]["command"]
    here = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [*services["keys"]["entrypoint"], script.replace("$$", "$").replace("/keys/", f"{tmp_path}/keys/")]
    subprocess.run(command, env=here, check=True, capture_output=True, timeout=120)
    assert [path.parent.parent for path in tmp_path.rglob("ca.key")] == [volumes["ca"]]
    for name, role in (*zip(third, third, strict=True), ("server", "server"), ("gateway", "client")):
        mounts = {target: source for source, target, *_ in (volume.split(":") for volume in services[name]["volumes"])}
        assert services[name]["command"][services[name]["command"].index("--keys") + 1] == "/keys"
        bundle = volumes[mounts["/keys"]]
        assert load_credentials(bundle, role).key == bundle / "key.pem"
        assert sorted(path.name for path in bundle.rglob("*")) == ["ca.pem", "cert.pem", "key.pem"]
        assert set(mounts.values()) & set(volumes) == {mounts["/keys"]}  # of nobody else's
        assert not [path for source in mounts.values() if "/" in source for path in (DEPLOY / source).rglob("*.key")]


def test_the_container_file() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text("utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    words = [line.split(None, 1) for line in lines]
    assert {word for word, _ in words} <= {"FROM", "ARG", "RUN", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"} and [
        word for word, _ in words[:2]
    ] == ["ARG", "FROM"]
    for word, rest in words:
        if word == "COPY" and not rest.startswith("--from="):
            assert all((DEPLOY.parent / source).exists() for source in rest.split()[:-1]), rest
    stages = [rest.split(" AS ")[1] for word, rest in words if word == "FROM"]
    assert stages == ["base", "dealer-made", "dealer", "parties"]  # without a target it is the last
    assert [rest for word, rest in words if word == "USER"] == ["privinf"] * 2


# ---- `slim.sh`


def slimmed(venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    here = {**os.environ, **environment}
    return subprocess.run(["sh", DEPLOY / "slim.sh", venv], env=here, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """One with packages of these names in it, that load; each file is a name for what becomes of it."""
    made = tmp_path / "venv"
    venvs.create(made, symlinks=True)
    (site,) = made.glob("lib/python*/site-packages")
    for name in ("privinf/dealer/dealer", "privinf/cli/dealer", "privinf/session/metrics", "privinf/pylib/goes", "pip/goes", "sympy/goes"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / f"{name}.py").touch()
    (site / "numba.py").write_text("njit = lambda f: f\n")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text(
        "int64 = 0\nclass ones:\n __init__ = lambda *_, **k: None\n __matmul__ = lambda x, y: x\n sum = lambda x: 4\n"
    )
    for name in ("torch/include/goes.h", "torch/nn/stays.py", "torch/nn/tests/goes.py", "torch/goes.pyi", "torch/testing/stays.py"):
        (site / name).parent.mkdir(exist_ok=True, parents=True)
        (site / name).touch()
    for name in ("sympy-1.dist-info", "torch-2.dist-info"):
        (site / name).mkdir()
    library = next(
        path for path in Path(sys.prefix).rglob("*.so") if b".symtab" in path.read_bytes() and 2**17 < path.stat().st_size < 2**21
    )
    for name in ("torch/lib.so", "torch.libs/patched.so"):
        (site / name).parent.mkdir(exist_ok=True)
        os.link(shutil.copy(library, tmp_path / f"{Path(name).stem}.so"), site / name)
    (site / "torch" / "no.so").write_bytes(bytes(2**17))
    return made


def test_slim_takes_what_no_dealer_loads_and_leaves_the_rest(venv: Path, tmp_path: Path) -> None:
    (site,) = venv.glob("lib/python*/site-packages")
    without = tmp_path / "bin"
    without.mkdir()
    for tool in ("cut", "du", "find", "rm", "sh"):
        (without / tool).symlink_to(str(shutil.which(tool)))
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    done = slimmed(venv, PATH=str(without))
    assert done.returncode == 0 and "there is no strip" in done.stderr and " MB, now " in done.stdout, done.stderr
    after = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    assert after == {path: data for path, data in before.items() if not path.stem.startswith("goes")}
    assert not (site / "sympy-1.dist-info").exists() and (site / "torch-2.dist-info").exists()
    if shutil.which("strip") is None:
        pytest.skip("there is no strip")
    assert slimmed(venv).stderr == ""
    stripped = {path.name for path in after if path.read_bytes() != after[path]}
    assert stripped == {"lib.so"} and (tmp_path / "lib.so").read_bytes() == after[site / "torch" / "lib.so"]
    assert not list(site.rglob("*.stripped"))


@pytest.mark.parametrize("how", ["nothing", "no-privinf", "whole", "broken"])
def test_slim_refuses_what_it_would_break(venv: Path, how: str) -> None:
    (site,) = venv.glob("lib/python*/site-packages")
    says = {"nothing": "no virtual environment", "no-privinf": "not installed", "whole": "has CrypTen", "broken": "does not work"}[how]
    if how == "nothing":
        (venv / "pyvenv.cfg").unlink()
    elif how == "no-privinf":
        shutil.rmtree(site / "privinf")
    elif how == "whole":
        (site / "crypten").mkdir()
    else:
        (site / "numba.py").write_text("import sympy.goes")
    done = slimmed(venv)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("slim.sh: ") and says in done.stderr
    assert (site / "torch" / "include" / "goes.h").exists() == (how != "broken")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit(unit: Path, tmp_path: Path) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit, "utf-8")
    assert parser.sections() == ["Unit", "Service", "Install"]
    program, verb, flag, config = parser["Service"]["ExecStart"].split()
    assert (program, flag, config) == ("/opt/privinf/bin/privinf", "--config", "/etc/privinf/privinf.yaml")
    options = options_of(verb, DEPLOY / "privinf.yaml")
    assert not [name for name, entry in options.items() if entry["from"] == "nowhere"]
    role = {"serve": "server", "gateway": "client"}.get(verb, verb)
    assert Path(options["keys"]["value"]) == Path("/etc/privinf/keys") / role  # its bundle, and not what holds the CA's key
    assert options["cache"]["value"] == f"/var/cache/{parser['Service']['CacheDirectory']}"
    assert 0 < float(options["drain"]["value"]) + UNWIND_S < float(parser["Service"]["TimeoutStopSec"])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    here = tmp_path / unit.name
    here.write_text(unit.read_text("utf-8").replace(program, sys.executable), "utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(here)], capture_output=True, text=True, timeout=PATIENCE)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if unit.stem in line]
    assert ours == [], ours


def test_units_for_all_three_parties() -> None:
    assert [unit.stem for unit in UNITS] == ["privinf-dealer", "privinf-gateway", "privinf-server"]


# ---- `config show`


def call(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["config", "show", *map(str, words)])
    return code, *capfd.readouterr()


def test_config_show(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "install", lambda: None)
    code, out, err = call(capfd, DEPLOY / "privinf.yaml")
    assert code == 0 and err == "" and [line for line in out.splitlines() if not line.startswith(" ")] == ["dealer:", "serve:", "gateway:"]
    file = tmp_path / "c.yaml"
    file.write_text("timeout: 7\ngateway:\n  api-key: very-secret-key\n  demo: x\nserve:\n  listen: localhost:1\n")
    code, out, err = call(capfd, file, "gateway")
    assert code == 0 and "very-secret" not in out and "api-key: (hidden)" in out and "timeout: 7\n" in out and "demo: x\n" in out
    assert "  active: 4  # default" in out
    code, out, err = call(capfd, file, "serve")
    assert code == 0 and "  model: required, and not given" in out
    code, out, err = call(capfd, file, "serve", "--json")
    assert code == 0 and yaml.safe_load(out)["verbs"]["serve"]["listen"] == {"value": "localhost:1", "from": "file"}
    for content, says in (
        ("serve: {lisen: x}", "perhaps 'listen'"),
        ("serve: {timeout: soon}", "timeout"),
        ("server: {}\nserve: {}", "'server' is no verb"),
        ("- x", "not a table"),
        ("x: 1", "no table for a verb"),
    ):
        file.write_text(content)
        code, out, err = call(capfd, file)
        assert code == 2 and out == "" and says in err and err.count("\n") == 1, err
    assert call(capfd, file, "nothing")[0] == 2 and call(capfd, DEPLOY / "privinf.yaml", "keys")[0] == 2
