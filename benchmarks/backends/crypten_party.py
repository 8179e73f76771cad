"""One party of stock CrypTen, as a process: `python -m benchmarks.backends.crypten_party`, driven by lines of JSON.

Bytes are read from the kernel's own counters of this process's TCP sockets (TCP_INFO), which gloo alone opens: what has been
acknowledged plus what waits in the send queue is what has been written. Rounds are the calls of CrypTen's communicator.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import time
import warnings
from multiprocessing.connection import Client, Listener
from typing import Any

from privinf.session.report import peak_rss_bytes

SIOCOUTQ, ACKED, RECEIVED = 0x5411, 120, 128  # <linux/sockios.h>; offsets in struct tcp_info of <linux/tcp.h>


class Sockets:
    """All connected TCP sockets of this process."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        for name in os.listdir("/proc/self/fd"):
            try:
                found = socket.socket(fileno=os.dup(int(name)))
            except OSError:
                continue
            try:
                found.getpeername()
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    self._sockets.append(found)
                    continue
            except OSError:
                pass
            found.close()

    @staticmethod
    def _info(sock: socket.socket, offset: int) -> int:
        return int(struct.unpack_from("<Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), offset)[0])

    def _written(self, sock: socket.socket) -> int:
        while True:
            before = self._info(sock, ACKED)
            queue = struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQ, b"\0" * 4))[0]
            if self._info(sock, ACKED) == before:
                return before + int(queue)

    def written(self) -> int:
        """Bytes written so far, all sockets."""
        return sum(self._written(sock) for sock in self._sockets)

    def written_by(self, own: int, peer: int) -> int:
        """Of the connections whose end here listens at port `own`, or has connected to port `peer`: both parties are in this process."""
        ends = [s for s in self._sockets if s.getsockname()[1] == own or s.getpeername()[1] == peer]
        return sum(self._written(sock) for sock in ends)

    def received(self) -> int:
        """Bytes that the kernel has received so far, all sockets."""
        return sum(self._info(sock, RECEIVED) for sock in self._sockets)

    def __len__(self) -> int:
        return len(self._sockets)

    def close(self) -> None:
        """Our duplicates; gloo's own stay."""
        for sock in self._sockets:
            sock.close()


class Pass:
    """One pass, from the client's ids (party 1) to its logits. The harness calls `__init__` and `end` while nothing moves."""

    def __init__(self, crypten: Any, graph: Any, vocab: int, rank: int) -> None:
        self.crypten, self.graph, self.vocab, self.rank = crypten, graph, vocab, rank
        self.comm = crypten.communicator.get()
        self.sockets = Sockets()
        self.before = (self.sockets.written(), self.sockets.received())
        self.ops: list[dict[str, Any]] = []
        self._last = self._now()

    def _now(self) -> list[float]:
        return [time.perf_counter(), time.thread_time(), self.sockets.written(), self.comm.comm_rounds]

    def _note(self, layer: str, op: str) -> None:
        current = self._now()
        seconds, cpu, sent, rounds = (now - then for now, then in zip(current, self._last, strict=True))
        counted = {"seconds": seconds, "cpu": cpu, "sent": sent, "rounds": rounds, "peak": peak_rss_bytes()}
        self.ops.append({"layer": layer, "op": op, **counted})
        self._last = current

    def run(self, ids: list[int]) -> Any:
        """The logits at party 1, None at party 0."""
        import torch

        def observe(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self._note(node.layer, node.name.removeprefix(f"{node.layer}.") if node.layer else node.name)

        self.comm.barrier()
        self._note("", "barrier")
        self.comm.comm_rounds = self._last[3] = self.ops[0]["rounds"] = 0
        began = time.perf_counter()
        one_hot = torch.zeros(1, len(ids), self.vocab)
        if self.rank == 1:
            one_hot[0, torch.arange(len(ids)), torch.tensor(ids)] = 1.0
        x = self.crypten.cryptensor(one_hot, src=1)
        self._note("", "input")
        y = self.graph(x, observe=observe)
        plain = y.get_plain_text(dst=1)
        self._note("", "reveal")
        self.seconds = time.perf_counter() - began
        return plain if self.rank == 1 else None

    def end(self) -> dict[str, Any]:
        """What was counted."""
        sent, received = self.sockets.written() - self.before[0], self.sockets.received() - self.before[1]
        self.sockets.close()
        return {"seconds": self.seconds, "ops": self.ops, "sent": sent, "received": received}


class Audit:
    """Both parties' shares before and after each truncation, side by side at party 1, over a Unix socket that the counters do not see.

    Each party truncates its own share, which is wrong by 2^64 / scale where the two shares wrap: a value z is lost with
    probability |z| / 2^64. Counted are the truncations, those that are off by more than 2 units, and what was to be expected.
    """

    def __init__(self, rank: int, address: str) -> None:
        self.rank, self.found = rank, {"truncations": 0, "truncation failures": 0, "truncation failures, expected": 0.0}
        if rank == 0:
            with Listener(address, "AF_UNIX") as listener:
                self.peer = listener.accept()
        else:
            while True:
                try:
                    self.peer = Client(address, "AF_UNIX")
                    break
                except (FileNotFoundError, ConnectionRefusedError):  # not there yet, or there and not listening yet
                    time.sleep(0.01)

    def run(self, tensor: Any, work: Any) -> Any:
        """`work` over all truncations of the class of `tensor`."""
        original = tensor.div_

        def div_(one: Any, y: Any) -> Any:
            before = one.share.clone()
            result = original(one, y)
            if isinstance(y, int) or (isinstance(y, float) and int(y) == y):
                self._compare(before, one.share, int(y))
            return result

        tensor.div_ = div_
        try:
            return work()
        finally:
            tensor.div_ = original
            self.peer.close()

    def _compare(self, before: Any, after: Any, scale: int) -> None:
        import torch

        if self.rank == 0:
            self.peer.send_bytes(torch.stack([before, after]).contiguous().numpy().tobytes())
            return
        theirs = torch.frombuffer(bytearray(self.peer.recv_bytes()), dtype=torch.int64).reshape(2, *before.shape)
        z, quotient = theirs[0] + before, theirs[1] + after
        off = (quotient - z.div(scale, rounding_mode="floor")).abs()
        self.found["truncations"] += z.numel()
        self.found["truncation failures"] += int((off > 2).sum())
        self.found["truncation failures, expected"] += float(z.double().abs().sum()) / 2.0**64


def emit(event: str, **values: Any) -> None:
    """One line for the harness."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Lines in: the configuration, then queries; lines out: events."""
    warnings.simplefilter("ignore")
    config = json.loads(sys.stdin.readline())
    rank = int(config["rank"])
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "RENDEZVOUS": f"file://{config['work']}/rendezvous",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    from privinf.crypten_adapter import crypten_module
    from privinf.local.child import encode_tensor
    from privinf.lowering import load

    crypten = crypten_module()
    crypten.init()
    crypten.config.cfg.communicator.verbose = True  # counts the communicator's calls
    emit("connected")
    sys.stdin.readline()  # the other party has come as far
    sockets = Sockets()
    began, before = time.perf_counter(), sockets.written()
    lowered = load(config["directory"])
    graph = lowered.graph.encrypted_copy(src=0)
    setup = {"seconds": time.perf_counter() - began, "sent": sockets.written() - before}
    sockets.close()
    emit("ready", setup=setup, provider=crypten.config.cfg.mpc.provider, connections=len(sockets))
    ArithmeticSharedTensor, audits = crypten.mpc.primitives.ArithmeticSharedTensor, 0
    while sys.stdin.readline():
        one = Pass(crypten, graph, lowered.info.vocab, rank)
        emit("prepared")
        query, audit = json.loads(sys.stdin.readline()), None
        if query["audit"]:
            audits += 1
            audit = Audit(rank, f"{config['work']}/audit{audits}")
            logits = audit.run(ArithmeticSharedTensor, lambda: one.run(query["ids"]))  # noqa: B023
        else:
            logits = one.run(query["ids"])
        emit("done", logits=None if logits is None else encode_tensor(logits), audit=audit.found if audit else None)
        if not sys.stdin.readline():
            break
        emit("pass", **one.end())
    emit("ended", pid=os.getpid(), peak_rss_bytes=peak_rss_bytes())
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not end by themselves


if __name__ == "__main__":
    main()
