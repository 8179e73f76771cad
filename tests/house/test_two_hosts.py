"""Two hosts with addresses of their own: dealer and server on one, the client on the other, by the two commands of docs/deployment.md."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from privinf.lowering.explain import explain
from tests.support import trio as t

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "two-hosts.sh"


def can_have_hosts() -> bool:
    """Whether this process may make a network namespace and enter it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"privinf-try-{uuid.uuid4().hex[:8]}"
    cable = ["ip", "link", "add", "name", "one", "type", "veth", "peer", "name", "two"]
    found = [
        subprocess.run(["ip", "netns", *words], capture_output=True, check=False).returncode
        for words in (["add", name], ["exec", name, *cable], ["del", name])
    ]
    return not any(found)


pytestmark = pytest.mark.skipif(not can_have_hosts(), reason="needs root, iproute2 and network namespaces")


def netns(*words: str) -> str:
    return subprocess.run(["ip", "netns", *words], capture_output=True, text=True, check=True).stdout


@dataclass
class Hosts:
    environment: dict[str, str]
    place: Path
    serving: subprocess.Popen[bytes]

    @property
    def err(self) -> str:
        return (self.place / "err").read_text()

    def ask(self, prompt: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SCRIPT), "ask", prompt, *words]
        return subprocess.run(command, env=self.environment, cwd="/", capture_output=True, text=True, timeout=2 * t.PATIENCE, check=False)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The first command, while it serves."""
    place = tmp_path_factory.mktemp("hosts") / f"p{uuid.uuid4().hex[:6]}"
    place.mkdir()
    environment = {**os.environ, "PRIVINF": f"{sys.executable} -m privinf", "PRIVINF_HOSTS": str(place), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "PRIVINF_KERNELS": "0"}  # nothing is compiled beside the parties
    with (place / "err").open("wb") as err:
        command = ["bash", str(SCRIPT), "serve", str(t.lowered_directory())]
        serving = subprocess.Popen(command, env=environment, cwd="/", stdout=err, stderr=err)
        made = Hosts(environment, place, serving)
        try:
            t.wait_for(lambda: "server listens on 192.0.2.1:7000" in made.err and "dealer listens on" in made.err, about=lambda: made.err)
            yield made
            running = {int(pid) for pid in netns("pids", f"{place.name}-far").split()}
            assert len(running) == 2
        finally:
            serving.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                serving.wait(t.PATIENCE)
            serving.kill()
    assert serving.returncode == 0, made.err
    assert place.name not in netns("list") and not t.running(running)
    assert "server stops" in made.err and "dealer stops" in made.err


def test_a_private_reply_between_two_hosts(hosts: Hosts) -> None:
    done = hosts.ask("def main(", "--max-new-tokens", "4", "--ignore-eos", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["tokens"]) == 4 and t.is_greedy(t.tokenizer().encode("def main(").ids, result["tokens"])
    # what a prompt of nine and three further tokens cost with the cache
    costs = explain(t.lowered(), 9, new_tokens=4)["total"]
    assert (result["traffic"]["online"]["payload"], result["traffic"]["online"]["rounds"]) == (costs["online_bytes"], costs["rounds"])


def test_the_hosts_have_addresses_of_their_own(hosts: Hosts) -> None:
    host = f"{hosts.place.name}-near"
    for name, address in (("near", "192.0.2.2"), ("far", "192.0.2.1")):
        found = json.loads(netns("exec", f"{hosts.place.name}-{name}", "ip", "-json", "address"))
        assert next(info["local"] for link in found if link["ifname"] == "cable" for info in link["addr_info"]) == address
    routes = netns("exec", host, "ip", "route")
    assert "default" not in routes and routes.startswith("192.0.2.0/24 dev cable")
    # and networks of their own: neither host's is the other's or this machine's
    far = [int(pid) for pid in netns("pids", f"{hosts.place.name}-far").split()]
    networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in far}
    inside = netns("exec", host, "readlink", "/proc/self/ns/net").strip()
    assert len(far) == 2 and len({*networks, inside, os.readlink("/proc/self/ns/net")}) == 3


def test_the_script_says_how_it_is_used() -> None:
    for words in ((), ("ask",), ("serve", "a", "b"), ("x",)):
        done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=2 * t.PATIENCE, check=False)
        assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1
