"""A job of `privinf batch` killed at random moments, or on a cluster that loses a node: each prompt answered once, as one by one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.callers import CLEAR
from benchmarks.deployment import ROOT, Deployment
from benchmarks.measure import Run
from benchmarks.networks import Network
from privinf.client.client import Client
from privinf.client.text import Streamer
from privinf.client.tokenizer import load_tokenizer
from privinf.session.options import Options
from protocols.errors import ConfigError, TransportError

PROMPT = 16
TRIES = 40  # prompts that are looked at for each that is wanted, where they are drawn
STEP = 7  # tokens between two prompts, where they are of a text
TOGETHER = 64
LOOK_S = 0.05
LATEST_S = 1.0  # after a line was written, a kill comes


@dataclass(frozen=True)
class Extent:
    """How many prompts, of how many new tokens, by how many sessions; kills, or nodes of which one is removed.

    And of how many it is looked what they give one by one.
    """

    prompts: int = 2000
    tokens: int = 8
    sessions: int = 2
    kills: int = 10
    nodes: int = 0
    alone: int = 50


def jobs(run: Run, work: Path, *, model: Path, extent: Extent) -> None:
    """Prompts whose every token is float's best by a margin: a correct system can give one reply only. Some are asked one by one too."""
    network = run.network(model, work)
    source, output = work / "prompts.jsonl", work / "replies.jsonl"
    wanted = _written(network, extent, source)
    with Deployment(network.directory, work / "parties") as parties:
        server, dealer, keys = parties.places
        cache = work / "client"
        with Client(server, dealer=dealer, keys=keys, options=Options(cache=cache)) as client:
            unlike = sum(_one(client, ids, extent.tokens) != reply for ids, reply in wanted[: extent.alone])
        words = ["batch", source, "-o", output, "--server", server, "--dealer", dealer, "--keys", keys, "--cache", cache, "--ignore-eos"]
        words += ["--max-new-tokens", extent.tokens, "--sessions", extent.sessions, "--json"]
        with _cluster(extent.nodes) as cluster:
            words += ["--engine", "ray", "--ray-address", cluster.address] if cluster else []
            began = time.monotonic()
            kills = 0 if cluster else _kill(words, output, extent)
            told = _finish(words, output, cluster, extent.prompts // 2)
            seconds = time.monotonic() - began
    many, differ = faults([_text(network, reply) for _, reply in wanted], _replies(output))
    what, now = f"of {extent.nodes} nodes, one removed" if extent.nodes else "killed", told["requests"] - told["before"]
    for name, value, unit in (
        ("prompts", extent.prompts, ""),
        ("kills", kills, ""),
        ("answered before the last start", told["before"], ""),
        ("seconds, kills and starts included", seconds, "s"),
        ("prompts a second, kills and starts included", extent.prompts / seconds, "1/s"),
        ("prompts a second of the last run", now / told["seconds"] if now else 0.0, "1/s"),
    ):
        run.measure(name, value, unit, network, PROMPT, of=what)
    run.note(f"replies of {extent.tokens} tokens to {extent.prompts} prompts of {PROMPT}, {extent.sessions} sessions at a time")
    run.require(f"of {extent.prompts} prompts, not answered exactly once", "", 0, many)
    run.require(f"of {extent.prompts} replies, not the reference's", "", 0, differ)
    run.require(f"of {min(extent.alone, len(wanted))} replies one by one, not the reference's", "", 0, unlike)
    run.require("prompts that failed", "", 0, told["failed"])


def faults(wanted: Sequence[str], found: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """How many prompts, numbered from 1, were not answered exactly once, or an answer has none; and how many otherwise than is wanted."""
    names = {str(number): text for number, text in enumerate(wanted, 1)}
    many = sum(len(found.get(name, ())) != 1 for name in names) + len(found.keys() - names.keys())
    return many, sum(text != names.get(name, "") for name, texts in found.items() for text in texts)


def _written(network: Network, extent: Extent, source: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts, all different, with their replies; the file of requests."""
    found: dict[tuple[int, ...], list[int]] = {}
    candidates = _windows(network, extent.prompts)
    while len(found) < extent.prompts and (some := list(itertools.islice(candidates, TOGETHER))):
        found |= _clear(network, some, extent.tokens)
    if len(found) < extent.prompts:
        raise ConfigError(
            f"only {len(found)} prompts have replies of {extent.tokens} clear tokens", remedy="ask for fewer prompts or tokens"
        )
    wanted = [(list(ids), reply) for ids, reply in found.items()][: extent.prompts]
    source.write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids, _ in wanted))
    return wanted


def _windows(network: Network, count: int) -> Iterator[tuple[int, ...]]:
    """Different prompts: of this program's own text where there is a tokenizer, else from fixed seeds."""
    tokenizer, seen = load_tokenizer(network.lowered.tokenizer), set[tuple[int, ...]]()
    if tokenizer is None:
        found: Iterator[Sequence[int]] = (network.ids(PROMPT, number) for number in range(TRIES * count))
    else:
        paths = sorted(path for room in ("privinf", "protocols", "benchmarks") for path in (ROOT / room).rglob("*.py"))
        text = tokenizer.encode("\n".join(path.read_text("utf-8") for path in paths))
        found = (text[at : at + PROMPT] for at in range(0, len(text) - PROMPT, STEP))
    for ids in found:
        if tuple(ids) not in seen:
            seen.add(tuple(ids))
            yield tuple(ids)


def _clear(network: Network, prompts: list[tuple[int, ...]], tokens: int) -> dict[tuple[int, ...], list[int]]:
    """Of these, those whose `tokens` best next ones are clear, with them."""
    left = torch.tensor(prompts)  # (B, T)
    with torch.no_grad():
        for _ in range(tokens):
            best = network.lowered.graph(left).reshape(len(left), -1).topk(2)  # (B, 2)
            clear = best.values[:, 0] - best.values[:, 1] >= CLEAR
            left = torch.cat([left, best.indices[:, :1]], 1)[clear]  # (B', T + 1)
            if not len(left):
                break
    return {tuple(ids[:PROMPT]): ids[PROMPT:] for ids in left.tolist()}


def _one(client: Client, ids: list[int], tokens: int) -> list[int]:
    return [token.id for token in client.generate(ids=ids, max_new_tokens=tokens, ignore_eos=True)]


def _text(network: Network, reply: list[int]) -> str:
    """What a job writes of it."""
    if network.lowered.tokenizer is None:
        return json.dumps(reply)
    streamer = Streamer(load_tokenizer(network.lowered.tokenizer))
    for token in reply:
        streamer.add(token)
    return streamer.finish() or ""


def _replies(output: Path) -> dict[str, list[str]]:
    """What each prompt was answered."""
    found: dict[str, list[str]] = {}
    for line in output.read_text().splitlines():
        each = json.loads(line)
        answer = found.setdefault(each["custom_id"], [])
        if each["response"]["status_code"] == 200:
            choice = each["response"]["body"]["choices"][0]
            answer.append(json.dumps(choice["token_ids"]) if "token_ids" in choice else choice["text"])
        else:
            answer.append("")
    return found


def _count(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


@contextlib.contextmanager
def _job(words: list[Any], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "privinf", *map(str, words)]
    with log.open("ab") as err:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=err, stdin=subprocess.DEVNULL)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


def _kill(words: list[Any], output: Path, extent: Extent) -> int:
    """The job again and again, each ended by SIGKILL at a moment of its own; how many were."""
    drawn, kills = random.SystemRandom(), 0
    moments = sorted(drawn.randrange(extent.prompts) for _ in range(extent.kills))
    for enough in moments:
        with _job(words, output.with_suffix(".log")) as job:
            while job.poll() is None and _count(output) < enough:
                time.sleep(LOOK_S)
            time.sleep(drawn.uniform(0, LATEST_S))
            if job.poll() is None:
                job.send_signal(signal.SIGKILL)
                kills += 1
            print(f"{time.strftime('%H:%M:%S')} killed with {_count(output)} of {extent.prompts} answered", file=sys.stderr, flush=True)
    return kills


def _finish(words: list[Any], output: Path, cluster: Any, lose_at: int) -> dict[str, Any]:
    """The job to its end, with a node removed on the way where there is a cluster; what it says."""
    log = output.with_suffix(".log")
    with _job(words, log) as job:
        while cluster and job.poll() is None and _count(output) < lose_at:
            time.sleep(LOOK_S)
        if cluster:
            cluster.remove_node(cluster.lost, allow_graceful=False)
            print(f"{time.strftime('%H:%M:%S')} a node removed with {_count(output)} answered", file=sys.stderr, flush=True)
        out, _ = job.communicate()
    if job.returncode not in (0, 4):
        last = (log.read_text("utf-8", "replace").splitlines() or ["nothing"])[-1]
        raise TransportError(f"the job ended with {job.returncode}: {last}")
    found: dict[str, Any] = json.loads(out)
    return found


@contextlib.contextmanager
def one_machine(cpus: int) -> Iterator[Any]:
    """A Ray cluster of one node, which has room for so many workers whatever this machine has."""
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        raise ConfigError("Ray is not installed", remedy="pip install 'privinf[ray]'") from None
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are as the parties beside them, and not starved on a busy machine
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        yield cluster
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()


@contextlib.contextmanager
def _cluster(nodes: int) -> Iterator[Any]:
    """A Ray cluster of so many nodes on this machine, a worker each; None for none."""
    if not nodes:
        yield None
        return
    with one_machine(1) as cluster:
        cluster.lost, *_ = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
        cluster.wait_for_nodes()
        yield cluster
