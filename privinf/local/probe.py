"""Dumps of every node's shares to files, for `privinf compare`: only its own local processes ever load this module.

Nothing extra crosses the sockets. The files lie in a temporary directory of the one who compares and holds both parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from privinf.graph.private import PrivinfTensor
from protocols.party import Party
from protocols.ring import decode


def dumping(directory: Path, role: str) -> Callable[[Party], Any]:
    """A factory of observers for `Graph.forward`, a new file for each node of each pass."""
    passes = [0]

    def begin(party: Party) -> Any:
        number, passes[0] = passes[0], passes[0] + 1

        def observe(node: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, PrivinfTensor) and output.held is not None:
                meta = {"bits": str(output.held.bits), "frac": str(output.held.frac)}
                save_file({"share": output.held.value.contiguous().cpu()}, directory / f"{number}.{role}.{node.name}", meta)

        return observe

    setattr(begin, "observes", True)  # noqa: B010  (its passes are walked, not replayed)
    return begin


def reconstruct(directory: Path, number: int, name: str) -> Tensor:
    """The value of a node in a pass, from both parties' files, float64."""
    from safetensors import safe_open

    paths = [directory / f"{number}.{role}.{name}" for role in ("server", "client")]
    with safe_open(paths[0], "pt") as file:
        meta = file.metadata()
    shares = [load_file(path)["share"] for path in paths]
    return decode(shares[0] + shares[1], int(meta["bits"]), int(meta["frac"]))
