"""What a party says and does where something fails: one readable line, the right exit code, and the others go on."""

from __future__ import annotations

import re
import time

from tests.support.trio import Process, Services
from tests.support.waiting import PATIENCE

LINE = re.compile(r"(privinf|\d{4}-\d\d-\d\d \S+ privinf\.(server|dealer)): [^\n]{20,600}")


def is_well(services: Services) -> bool:
    """A client gets its answer."""
    process = services.generate("--max-new-tokens", 1, "--json")
    assert process.wait() == 0, process.err
    return True


def new_lines(process: Process, before: int, most: int = 1, seconds: float = PATIENCE) -> list[str]:
    """What a party says of a failure: one readable line, or at most one for each of its connections."""
    process.until_lines(before + 1, seconds)
    time.sleep(0.1)
    lines = process.lines[before:]
    assert 1 <= len(lines) <= most, process.err
    assert all(LINE.fullmatch(line) for line in lines), lines
    return lines


def failed(client: Process, codes: tuple[int, ...]) -> str:
    """The one line of a client that ends with one of these codes, but for those on what it waited for."""
    code = client.wait()
    assert code in codes, (code, client.err)
    lines = client.said
    assert len(lines) == 1 and LINE.fullmatch(lines[0]), client.err
    return lines[0]
