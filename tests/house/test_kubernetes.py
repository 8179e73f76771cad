"""`deploy/kubernetes`, read as kustomize would: all documents against Kubernetes's schemas, and what they say of each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from privinf.cli.config import options_of
from privinf.transport.keys import load_credentials
from tests.house.test_deploy import DEPLOY, UNWIND_S

kubernetes = pytest.importorskip("kubernetes_validate")

BASE = DEPLOY / "kubernetes"
VERSIONS = ("1.29", "1.33", "1.37")
PARTIES = {"dealer": "dealer", "server": "serve", "gateway": "gateway"}
"""Directory and verb."""
FIRST = {"privinf-dealer-keys", "privinf-server-keys", "privinf-client-keys", "privinf-api-key"}
"""Secrets that are made before."""


def rendered(directory: Path) -> Iterator[dict[str, Any]]:
    """The documents of a kustomization, without the suffixes of generated names."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text("utf-8"))
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "configMapGenerator", "images"}
    for name in kustomization["resources"]:
        if (directory / name).is_dir():
            yield from rendered(directory / name)
        else:
            yield from yaml.safe_load_all((directory / name).read_text("utf-8"))
    for generator in kustomization.get("configMapGenerator", ()):
        data = {name: (directory / name).read_text("utf-8") for name in generator["files"]}
        yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


ALL = list(rendered(BASE))


def of(kind: str, party: str) -> dict[str, Any]:
    (found,) = [each for each in ALL if each["kind"] == kind and each["metadata"]["name"] == f"privinf-{party}"]
    return found


def pod_of(party: str) -> dict[str, Any]:
    spec: dict[str, Any] = of("StatefulSet", party)["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid(version: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in ALL]
    assert len(names) == len(set(names)) == 18
    for document in ALL:
        kubernetes.validate(document, version, strict=True)


def test_a_slip_would_be_seen() -> None:
    for path in (("spec", "replica"), ("spec", "template", "spec", "runAsNonRoot"), ("metadata", "labls")):
        broken = copy.deepcopy(of("StatefulSet", "server"))
        place = broken
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = 1
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("party", PARTIES)
def test_a_party_is_confined(party: str) -> None:
    pod = pod_of(party)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert f"--uid {pod['securityContext']['runAsUser']} " in (DEPLOY / "Containerfile").read_text()
    for container in (*pod["initContainers"], *pod["containers"]):
        confined = container["securityContext"]
        assert (
            confined["readOnlyRootFilesystem"]
            and not confined["allowPrivilegeEscalation"]
            and confined["capabilities"] == {"drop": ["ALL"]}
        )
    policy = of("NetworkPolicy", party)["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and all("from" in rule for rule in policy["ingress"])
    assert all("to" in rule for rule in policy["egress"])


@pytest.mark.parametrize("party", PARTIES)
def test_what_a_party_reads_is_there(party: str) -> None:
    """Its configuration is read as the verb reads it, and every path and port in it is one that its pod has."""
    pod, verb = pod_of(party), PARTIES[party]
    (container,) = pod["containers"]
    assert container["args"] == [verb, "--config", "/config/privinf.yaml"]
    found = options_of(verb, BASE / party / "privinf.yaml")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    given = yaml.safe_load((BASE / party / "privinf.yaml").read_text("utf-8"))[verb]
    assert given["keys"] == "/keys" and given["cache"] == "/cache" and {"/keys", "/cache", "/config", "/tmp"} <= mounts and found
    volumes = {volume["name"]: volume for volume in pod["volumes"]} | {
        claim["metadata"]["name"]: claim for claim in of("StatefulSet", party)["spec"]["volumeClaimTemplates"]
    }
    for each in (*pod["initContainers"], container):
        assert {mount["name"] for mount in each["volumeMounts"]} <= set(volumes)
    assert volumes["secret"]["secret"]["secretName"] in FIRST and of("ConfigMap", party)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = given["http" if party == "gateway" else "listen"].rpartition(":")[2]
    service = of("Service", party)["spec"]
    assert [port["port"] for port in service["ports"]] == [ports[port["targetPort"]] for port in service["ports"]] == [int(listens)]
    assert {rule["ports"][0]["port"] for rule in of("NetworkPolicy", party)["spec"]["ingress"]} == set(ports.values())
    assert int(given["metrics"].rpartition(":")[2]) == ports["metrics"]
    for name in ("server", "dealer"):
        if name in given:
            host, _, port = given[name].partition(":")
            assert of("Service", host.removeprefix("privinf-"))["spec"]["ports"][0]["port"] == int(port)
            assert int(port) in [rule["ports"][0]["port"] for rule in of("NetworkPolicy", party)["spec"]["egress"]]


@pytest.mark.parametrize("party", PARTIES)
def test_probes_and_the_end(party: str) -> None:
    pod = pod_of(party)
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    port = "http" if party == "gateway" else "metrics"
    assert {probe["port"] for probe in probes.values()} == {port}
    assert [probes[name]["path"] for name in ("startup", "liveness", "readiness")] == ["/healthz", "/healthz", "/readyz"]
    given = yaml.safe_load((BASE / party / "privinf.yaml").read_text("utf-8"))[PARTIES[party]]
    assert given["drain"] + UNWIND_S < pod["terminationGracePeriodSeconds"]


def test_sessions_stay_where_they_are_and_a_dealer_is_one() -> None:
    """The two connections of a session at a dealer come from two machines: no affinity of addresses would bring them together."""
    assert {of("Service", party)["spec"].get("sessionAffinity") for party in ("server", "gateway")} == {"ClientIP"}
    assert of("StatefulSet", "dealer")["spec"]["replicas"] == 1
    scaled = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in ALL if each["kind"] == "HorizontalPodAutoscaler"}
    assert set(scaled) == {"privinf-server", "privinf-gateway"}
    metrics = {name: spec["metrics"][0]["pods"]["metric"]["name"] for name, spec in scaled.items()}
    assert metrics == {"privinf-server": "privinf_turns_waiting", "privinf-gateway": "privinf_waiting_replies"}


def test_keys_are_copied_so_that_they_are_accepted(tmp_path: Path) -> None:
    """The command of the first container, on directories in place of its volumes: a key that a group can read is refused."""
    import subprocess

    from tests.support import trio as t

    secret, keys = tmp_path / "secret", tmp_path / "keys"
    secret.mkdir()
    keys.mkdir(mode=0o777)
    for path in (t.keys() / "server").iterdir():
        (secret / path.name).write_bytes(path.read_bytes())
        (secret / path.name).chmod(0o440)
    (container,) = pod_of("server")["initContainers"]
    shell, flags, command = container["command"]
    subprocess.run([shell, flags, command.replace("/secret/", f"{secret}/").replace("/keys/", f"{keys}/")], check=True)
    assert load_credentials(keys, "server").role == "server"
