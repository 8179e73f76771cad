"""Lanes of prepared queries, and what is known of them without looking into any: their names, marks and locks.

A lane is one model, one client's and one server's certificate, and the terms of the query; its name begins with the party's role,
so that all three may share a directory. Within a lane indices grow by one.

    CACHE/spent/LANE.json    the highest index that is spent, and the highest that was handed out
    CACHE/spent/LANE.lock    locked by whoever reads or changes either, or the lane's files
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec

from privinf.party.messages import Terms

LANE_NAME = re.compile(r"(server|client|dealer)-[0-9a-f]{16}-(\d+)\+(\d+)(?:-by(\d+))?(-logits)?-[0-9a-f]{16}")


class Lane(msgspec.Struct, frozen=True):
    """What prepared queries are interchangeable for; certificates by their fingerprints."""

    model: str
    client: str
    server: str
    terms: Terms

    def name(self, role: str) -> str:
        """Of its files at this party."""
        terms, digest = self.terms, hashlib.sha256(msgspec.json.encode(self)).hexdigest()
        chunk, logits = f"-by{terms.chunk}" if terms.chunk else "", "-logits" if terms.logits else ""
        return f"{role}-{self.client[:16]}-{terms.seq}+{terms.tokens}{chunk}{logits}-{digest[:16]}"


class Marks(msgspec.Struct, frozen=True):
    """The content of a lane's mark file."""

    lane: Lane
    spent: int = 0
    reserved: int = 0


def overview(cache: Path) -> list[dict[str, Any]]:
    """All lanes of all roles in a cache: `name`, `role`, `seq`, `max_new_tokens`, `chunk`, `logits`, `model`, `count`, `spent`."""
    names = {path.name for path in (cache / "prepared").glob("*") if path.is_dir()}
    names |= {path.stem for path in (cache / "spent").glob("*.json")}
    found = []
    for name in sorted(names):
        match = LANE_NAME.fullmatch(name)
        if match is None:
            continue
        spent: int | None = 0
        model: str | None = None
        with contextlib.suppress(FileNotFoundError):
            try:
                marks = msgspec.json.decode((cache / "spent" / f"{name}.json").read_bytes(), type=Marks)
                spent, model = marks.spent, marks.lane.model
            except (msgspec.MsgspecError, ValueError):
                spent = None
        lengths = {"seq": int(match[2]), "max_new_tokens": int(match[3]), "chunk": int(match[4] or 0)}
        entry = {"role": match[1], **lengths, "logits": bool(match[5]), "model": model}
        count = sum(1 for _ in (cache / "prepared" / name).glob("*.bin"))
        found.append({"name": f"prepared/{name}", **entry, "count": count, "spent": spent})
    return found
