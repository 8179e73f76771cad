"""SPU, where the extra `spu` is installed: the same lowered graph through JAX, two parties over SPU's own TCP link on loopback.

Both parties are threads of this process, so their memory is not told apart, and SPU's own thread pools compute. The shares of the
inputs are handed over by the harness and not counted. Rounds are not counted: SPU's link does not say them.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import spu
import torch
from spu import libspu
from spu.utils import frontend

from benchmarks.backends.base import Counted, Sample
from benchmarks.backends.crypten_party import Sockets
from benchmarks.networks import Network
from benchmarks.schema import Link, Phase, Row, Socket, median
from protocols.errors import ConfigError

NAMES = ("server", "client")
LOG = libspu.logging.LogOptions()
LOG.log_level = libspu.logging.LogLevel.ERROR
LOG.system_log_path = LOG.trace_log_path = os.devnull
libspu.logging.setup_logging(LOG)


class Traced:
    """A JAX value with the tensor methods that the bodies of the graph's nodes use."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Any:
        methods: dict[str, Any] = {
            "matmul": lambda x: jnp.matmul(self.value, plain(x)),
            "add": lambda x: self.value + plain(x),
            "sub": lambda x: self.value - plain(x),
            "mul": lambda x: self.value * plain(x),
            "div": lambda x: self.value / plain(x),
            "square": lambda: self.value * self.value,
            "reshape": lambda *shape: self.value.reshape(*shape),
            "permute": lambda *axes: jnp.transpose(self.value, axes),
            "transpose": lambda a, b: jnp.swapaxes(self.value, a, b),
            "unsqueeze": lambda axis: jnp.expand_dims(self.value, axis),
            "softmax": lambda axis: jax.nn.softmax(self.value, axis),
            "relu": lambda: jnp.maximum(self.value, 0),
            "tanh": lambda: jnp.tanh(self.value),
            "mean": lambda axis, keepdim: jnp.mean(self.value, axis, keepdims=keepdim),
            "inv_sqrt": lambda: jax.lax.rsqrt(self.value),
        }
        if name not in methods:
            raise AttributeError(name)
        return lambda *words, **more: Traced(methods[name](*words, **more))

    def __getitem__(self, place: Any) -> Traced:
        return Traced(self.value[place])

    def size(self, axis: int) -> int:
        """As torch's."""
        return int(self.value.shape[axis])


def plain(x: Any) -> Any:
    """What JAX understands."""
    return x.value if isinstance(x, Traced) else x.numpy() if isinstance(x, torch.Tensor) else x


class SpuBackend:
    """One party's `rank` is its place in NAMES. The graph is compiled at the first pass, which is the warm-up."""

    protocol: libspu.ProtocolKind
    name = ""
    trust = ""

    def __init__(self, network: Network, seq: int, **options: Any) -> None:
        if options.get("link") not in (None, "loopback"):
            raise ConfigError(f"the link of the backend {self.name} cannot be emulated", remedy="leave --link out, or the backend")
        self.network, self.seq = network, seq
        self._seconds: list[float] = []
        self._passes: list[tuple[int, int]] = []  # bytes sent by each party

    def __enter__(self) -> Self:
        graph = self.network.lowered.graph
        self._places = [(node, key) for node in graph.nodes for key in node.parameter_shapes]
        weights = [np.ascontiguousarray(node.value(key).numpy(), np.float32) for node, key in self._places]
        self._config = libspu.RuntimeConfig(protocol=self.protocol, field=libspu.FieldType.FM64)
        self._io = spu.Io(2, self._config)
        example = [np.zeros((1, self.seq, self.network.lowered.info.vocab), np.float32), *weights]
        names = [f"in{place}" for place in range(len(example))]
        self._program, _ = frontend.compile(
            frontend.Kind.JAX,
            self._forward,
            example,
            {},
            names,
            [libspu.Visibility.VIS_SECRET] * len(example),
            lambda out: [f"out{place}" for place in range(len(out))],
        )
        self._weights = [self._io.make_shares(w, libspu.Visibility.VIS_SECRET) for w in weights]
        ports = [_free_port() for _ in range(2)]
        self._ports = ports
        desc = libspu.link.Desc()
        for rank, port in enumerate(ports):
            desc.add_party(NAMES[rank], f"127.0.0.1:{port}")
        links = _both(lambda rank: libspu.link.create_brpc(desc, rank))
        self._runtimes = _both(lambda rank: spu.Runtime(links[rank], self._config))
        self._links = links
        for rank, runtime in enumerate(self._runtimes):
            for place, shares in enumerate(self._weights):
                runtime.set_var(names[place + 1], shares[rank])
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_links"):
            _both(lambda rank: self._links[rank].stop_link())  # each waits for the other

    def _forward(self, one_hot: Any, *weights: Any) -> Any:
        """The graph's own nodes on JAX values; their parameters are put back afterwards."""
        before = [node._parameters[key] for node, key in self._places]
        try:
            for (node, key), weight in zip(self._places, weights, strict=True):
                node._parameters[key] = Traced(weight)
            return self.network.lowered.graph(Traced(one_hot)).value
        finally:
            for (node, key), weight in zip(self._places, before, strict=True):
                node._parameters[key] = weight

    @staticmethod
    def needs(parameters: int, seq: int, vocab: int) -> int:
        """Float weights, both parties' shares, one-hot ids and the masks of their product."""
        return 400 * 2**20 + 60 * parameters + 96 * seq * vocab

    def once(self, ids: list[int], *, logits: bool = False) -> Sample:
        """One pass; `logits` changes nothing but that it is no sample."""
        one_hot = np.zeros((1, self.seq, self.network.lowered.info.vocab), np.float32)
        one_hot[0, np.arange(self.seq), ids] = 1.0
        shares = self._io.make_shares(one_hot, libspu.Visibility.VIS_SECRET)
        for rank, runtime in enumerate(self._runtimes):
            runtime.set_var("in0", shares[rank])
        before, began = self._written(), time.perf_counter()
        _both(lambda rank: self._runtimes[rank].run(self._program))
        seconds = time.perf_counter() - began
        after = self._written()
        self._passes.append((after[0] - before[0], after[1] - before[1]))
        if not logits:
            self._seconds.append(seconds)
        out = self._io.reconstruct([runtime.get_var("out0") for runtime in self._runtimes])
        found = torch.from_numpy(np.array(out)).double().reshape(-1)
        return Sample({"online": seconds}, found, int(found.argmax()))

    def _written(self) -> tuple[int, int]:
        """Bytes that each party's ends of the TCP connections between the two ports have written, by the kernel's counters."""
        sockets = Sockets()
        try:
            return sockets.written_by(self._ports[0], self._ports[1]), sockets.written_by(self._ports[1], self._ports[0])
        finally:
            sockets.close()

    def samples(self, phase: str) -> tuple[float, ...]:
        """Without the warm-up."""
        return tuple(self._seconds[1:] or self._seconds) if phase == "online" else ()

    def counted(self) -> Counted:
        """A row a party: SPU compiles the graph as a whole. What the first pass sends beyond the second is done once: the set-up."""
        found = Counted(notes=[f"{self.name}: rounds are not counted, inputs' shares are not on its link, threads are SPU's own"])
        setting: dict[str, Any] = {**self.network.sizes, "seq": self.seq, "backend": self.name, "device": "cpu", "link": Link()}
        wall, first, later = self.samples("online"), self._passes[0], self._passes[1 if len(self._passes) > 1 else 0]
        for rank, party in enumerate(NAMES):
            ends = {**setting, "party": party, "peer": NAMES[1 - rank]}
            found.sockets.append(Socket(**ends, bytes_sent=first[rank], bytes_received=first[1 - rank]))
            once = [max(0, first[place] - later[place]) for place in (rank, 1 - rank)]
            phases: list[tuple[Phase, int, int, tuple[float, ...]]] = [
                ("setup", once[0], once[1], ()),
                ("online", first[rank] - once[0], first[1 - rank] - once[1], wall),
            ]
            for phase, sent, received, times in phases:
                seconds: dict[str, Any] = {"seconds": median(times), "samples": times}
                whole: dict[str, Any] = {"trust": self.trust, "layer": "", "op": "whole graph", "rounds": 0}
                found.rows.append(Row(**ends, **whole, **seconds, phase=phase, bytes_sent=sent, bytes_received=received))
        return found


class Semi2kBackend(SpuBackend):
    """Additive shares; correlations from SPU's default first-party generator."""

    name = "spu-semi2k"
    trust = "party 0 can read everything: it makes all correlations itself (the default of SPU's SEMI2K)"
    protocol = libspu.ProtocolKind.SEMI2K


class CheetahBackend(SpuBackend):
    """Two parties alone."""

    name = "spu-cheetah"
    trust = "two-party: no dealer"
    protocol = libspu.ProtocolKind.CHEETAH


def _both(work: Any) -> list[Any]:
    """`work(rank)` of both parties at once; what one raises is raised."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
