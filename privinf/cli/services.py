"""What `serve` and `dealer` do once they listen."""

from __future__ import annotations

import signal
import sys
from typing import Any

from privinf.cli import common
from privinf.cli.signals import Stopped


def serve_until_stopped(service: Any, about: dict[str, str], as_json: bool) -> None:
    """Says where it listens, then waits for a signal, which is how a service ends: exit code 0."""
    model = f" with {about['variant']}, id {about['model']}" if "model" in about else ""
    try:
        print(f"{about['role']} listens on {service.address}{model}", file=sys.stderr, flush=True)
        if as_json:
            common.write_json({**about, "address": service.address})
        while True:
            signal.pause()
    except Stopped:
        print(f"{about['role']} stops", file=sys.stderr, flush=True)
