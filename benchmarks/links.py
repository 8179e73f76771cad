"""The links between the parties: loopback as it is, emulated in the transport, or shaped by the kernel in a network namespace."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

from benchmarks.schema import Link
from privinf.session.options import Options
from protocols.errors import ConfigError

NAMED = {"loopback": None, "lan": "lan", "wan": "wan", "4g": "50ms:30"}
"""`lan`: 0.5 ms, 1 Gbit/s; `wan`: 60 ms, 305 Mbit/s (SIGMA's); `4g`: 50 ms, 30 Mbit/s, a telephone's."""
CLONE_NEWNET = 0x40000000


def link_of(text: str | None) -> Link:
    """The schema's form of what `--link` takes; ConfigError for anything else."""
    found = Options(link=NAMED.get(text, text) if text else None).emulated
    return Link(found.rtt_ms, found.mbit_s, True) if found else Link()


def name_of(link: Link) -> str:
    """For people."""
    if link.rtt_ms is None:
        return "loopback"
    how = "emulated" if link.emulated else "kernel"
    return f"{link.rtt_ms:g} ms, {link.mbit_s:g} Mbit/s ({how})"


@contextlib.contextmanager
def kernel_link(rtt_ms: float, mbit_s: float) -> Iterator[Link]:
    """Processes started within talk over a loopback of their own, which the kernel's traffic control shapes.

    `netem` adds latency and rate; where the kernel lacks it, `tbf` the rate alone, and the link says 0 ms. One queue carries both
    directions. ConfigError where this process may not make a namespace, or `tc` is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET):
            raise ConfigError(
                f"no network namespace can be made: {os.strerror(ctypes.get_errno())}", remedy="run as root, or emulate links"
            )
        try:
            _tool("ip", "link", "set", "lo", "mtu", "1500", "up")
            try:
                _tool("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", f"{rtt_ms / 2}ms", "rate", f"{mbit_s}mbit")
            except ConfigError:
                _tool("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", f"{mbit_s}mbit", "burst", "64kb", "latency", "1s")
                rtt_ms = 0.0
            yield Link(rtt_ms, mbit_s, False)
        finally:
            libc.setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


def _tool(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True)
    except FileNotFoundError:
        raise ConfigError(f"the program {words[0]} is missing", remedy="install iproute2, or emulate links") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode("utf-8", "replace").split("\n")
        raise ConfigError(f"{words[0]} refuses: {lines[0].strip()}", remedy="emulate links") from None
