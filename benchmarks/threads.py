"""Both parties at once, a thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from privinf.transport.endpoint import Endpoint
from protocols.correlations import Role


def at_both(work: Callable[[Role], Any], ends: Mapping[Role, Endpoint]) -> dict[Role, Any]:
    """`work(role)` of each; the first error, by which that party's end is closed, so that the other does not wait."""
    results, errors = dict[Role, Any](), list[BaseException]()

    def guarded(role: Role) -> None:
        try:
            results[role] = work(role)
        except BaseException as error:
            errors.append(error)
            ends[role].close()

    threads = [threading.Thread(target=guarded, args=(role,)) for role in Role]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
