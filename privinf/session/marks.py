"""Lanes of prepared queries, and what is known of them without looking into any: their names, marks and locks.

A lane is one model, one client's and one server's certificate, and the terms of the query; its name begins with the party's role,
so that all three may share a directory. Within a lane indices grow by one.

    CACHE/spent/LANE.json    the highest index that is spent, and the highest that was handed out
    CACHE/spent/ROLE-CLIENT.lock    of all lanes of one client's certificate: locked by whoever reads or changes them, or their files

A lane can be used for as long as both certificates are valid. Once one has expired, whoever keeps its marks refuses every session in which
they would count: then they may go, `remove_lane`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from privinf.files import locked
from privinf.session.messages import Terms
from privinf.trust import DEALER, ONE_HOT

GRACE_S = 30 * 86400.0  # that a clock may be wrong by, before what a certificate stood for is forgotten
LANE_NAME = re.compile(r"(server|client|dealer)-[0-9a-f]{16}-(?:(\d+)\+(\d+)(?:-by(\d+))?(-logits)?|stock)-[0-9a-f]{16}")


class Lane(msgspec.Struct, frozen=True, omit_defaults=True):
    """What prepared queries are interchangeable for, or rows of a stock; certificates by their fingerprints."""

    model: str
    client: str
    server: str
    terms: Terms
    trust: str = DEALER
    embedding: str = ONE_HOT  # with a dealer
    stock: bool = False  # of rows for any query, of which each has an index

    def name(self, role: str) -> str:
        """Of its files at this party."""
        terms, digest = self.terms, hashlib.sha256(msgspec.json.encode(self)).hexdigest()
        if self.stock:
            return f"{role}-{self.client[:16]}-stock-{digest[:16]}"
        chunk, logits = f"-by{terms.chunk}" if terms.chunk else "", "-logits" if terms.logits else ""
        return f"{role}-{self.client[:16]}-{terms.seq}+{terms.tokens}{chunk}{logits}-{digest[:16]}"


class Marks(msgspec.Struct, frozen=True):
    """The content of a lane's mark file."""

    lane: Lane
    spent: int = 0
    reserved: int = 0
    until: float = 0.0  # when a certificate of the lane expires, seconds since the epoch; 0 where nobody noted it


def lock_of(cache: Path, name: str) -> Path:
    """The lock of the lane with this name."""
    return cache / "spent" / f"{'-'.join(name.split('-')[:2])}.lock"


def overview(cache: Path) -> list[dict[str, Any]]:
    """All lanes of all roles in a cache: `name`, `role`, `seq`, `max_new_tokens`, `chunk`, `logits`, `model`, `count`, `spent`, `expired`.

    Of a stock of rows, which is for no lengths, `seq` is 0. The last says whether a certificate has expired for so long that the marks can
    count no more.
    """
    names = {path.name for path in (cache / "prepared").glob("*") if path.is_dir()}
    names |= {path.stem for path in (cache / "spent").glob("*.json")}
    found = []
    for name in sorted(names):
        match = LANE_NAME.fullmatch(name)
        if match is None:
            continue
        spent: int | None = 0
        model: str | None = None
        until = 0.0
        with contextlib.suppress(FileNotFoundError):
            try:
                marks = msgspec.json.decode((cache / "spent" / f"{name}.json").read_bytes(), type=Marks)
                spent, model, until = marks.spent, marks.lane.model, marks.until
            except (msgspec.MsgspecError, ValueError):
                spent = None
        lengths = {"seq": int(match[2] or 0), "max_new_tokens": int(match[3] or 0), "chunk": int(match[4] or 0)}
        entry = {"role": match[1], **lengths, "logits": bool(match[5]), "model": model}
        count = sum(1 for _ in (cache / "prepared" / name).glob("*.bin"))
        found.append({"name": f"prepared/{name}", **entry, "count": count, "spent": spent, "expired": 0 < until < time.time() - GRACE_S})
    return found


def remove_lane(cache: Path, name: str, wait_s: float, *, marks: bool = False) -> None:
    """Removes a lane's prepared queries, and its marks only where that is asked for and they can count no more."""
    with locked(lock_of(cache, name), wait_s):
        shutil.rmtree(cache / "prepared" / name, ignore_errors=True)  # there may be a mark alone
        if marks and any(entry["expired"] for entry in overview(cache) if entry["name"] == f"prepared/{name}"):
            (cache / "spent" / f"{name}.json").unlink()
