"""An emulated link: latency and bandwidth added on the receiving side, for machines whose kernel cannot shape traffic.

A frame is delivered when a link of rate `mbit_s` would have carried its last bit, plus half a round trip: with `s` the sender's stamp,

    start = max(s, end of the frame before);  end = start + 8 * bytes / rate;  delivered at end + rtt / 2

Bytes are those of frames (header and body, without TLS). Stamps are wall-clock times of the sender, so both ends must run on one
machine. TCP's and TLS's own handshakes and heartbeats are not delayed. Every report of a time measured so must say 'emulated'.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from protocols.errors import ConfigError

_CUSTOM = re.compile(r"(\d+(?:\.\d+)?)\s*ms\s*:\s*(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Link:
    """Round-trip time in milliseconds and rate in megabits (10^6 bits) a second, each way; always emulated."""

    rtt_ms: float
    mbit_s: float

    def __post_init__(self) -> None:
        good_rtt, good_rate = math.isfinite(self.rtt_ms) and self.rtt_ms >= 0, math.isfinite(self.mbit_s) and self.mbit_s > 0
        if not good_rtt or not good_rate:
            raise ConfigError(
                f"a link of {self.rtt_ms} ms and {self.mbit_s} Mbit/s cannot be emulated",
                remedy="give a round trip of 0 ms or more and a rate above 0",
            )

    @property
    def bytes_per_s(self) -> float:
        """The rate in bytes per second."""
        return self.mbit_s * 125_000

    def __str__(self) -> str:
        return f"{self.rtt_ms:g} ms, {self.mbit_s:g} Mbit/s (emulated)"


LINKS = {"lan": Link(0.5, 1000.0), "wan": Link(60.0, 305.0)}
"""`lan`: 0.5 ms round trip, 1 Gbit/s; `wan`: 60 ms, 305 Mbit/s."""


def parse_link(text: str) -> Link:
    """`lan`, `wan`, or round trip and rate as `20ms:100` (milliseconds, Mbit/s); raises ConfigError for anything else."""
    known = LINKS.get(text.strip().lower())
    if known is not None:
        return known
    match = _CUSTOM.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(
            f"cannot read the link {text[:60]!r}",
            remedy="give lan (0.5ms:1000), wan (60ms:305) or RTTms:MBITS, for example 20ms:100",
        )
    return Link(float(match[1]), float(match[2]))


class Shaper:
    """The state of one end of an emulated link. Times are nanoseconds since the epoch."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._ns_per_byte = 1e9 / link.bytes_per_s
        self._half_rtt = round(link.rtt_ms * 5e5)
        self._busy_in = 0
        self._busy_out = 0

    def release(self, stamp: int, size: int, now: int) -> int:
        """When a frame of `size` bytes that left at `stamp` (0: not told, so now) is delivered; frames must be given in their order."""
        start = max(min(stamp or now, now), self._busy_in)  # a stamp from the future is a clock that was set back: do not wait for it
        self._busy_in = start + round(size * self._ns_per_byte)
        return self._busy_in + self._half_rtt

    def sent(self, stamp: int, size: int) -> None:
        """Takes note of what we sent, for `arrival`."""
        self._busy_out = max(stamp, self._busy_out) + round(size * self._ns_per_byte)

    def arrival(self) -> int:
        """When the peer will have what we sent so far: its time to answer counts from then."""
        return self._busy_out + self._half_rtt
