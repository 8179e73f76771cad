"""`torch.export`, quietly: what it has to say of a module that it cannot trace becomes one line with the module's path.

With PRIVINF_DEBUG=1, as `--debug` sets it, torch says everything, and its exception stays the cause of ours.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from protocols.errors import ConfigError, UnsupportedOpError

aten = torch.ops.aten

# Operators that are only other spellings of operators in the table: the exporter takes these apart, nothing else, so that an
# unsupported operator is reported under the name that its module used.
SPELLED_OUT = (aten.einsum.default, aten.tensordot.default, aten.inner.default, aten.outer.default, aten.kron.default)

OTHERS = tuple(f"{place}{os.sep}" for place in (Path(torch.__file__).parent, Path(__file__).parents[1], Path(os.__file__).parent))
"""Where code that is not the module's own lies: torch, this package, Python's library."""


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """`torch.export`, free of in-place operators and of the spellings that the table does not hold."""
    try:
        with _quiet():
            program: ExportedProgram = torch.export.export(module, inputs, strict=False)
            if any(must_be_rewritten(node.target) for node in program.graph.nodes):
                known = torch.export.default_decompositions()
                program = program.run_decompositions({op: known[op] for op in SPELLED_OUT if op in known})
            return program
    except Exception as error:
        why, remedy = _why(error)
        message = f"torch.export cannot trace the module{place_in(module, error)}: {why}"
        raise UnsupportedOpError(message, remedy=remedy) from shown(error)


def run_once(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The module's own output; ConfigError says where it fails. The caller's tensors stay as they are."""
    try:
        return module(*(value.clone() for value in inputs))
    except Exception as error:
        message = f"the module does not run on the example inputs{place_in(module, error)}: {first_line(error)}"
        raise ConfigError(message) from shown(error)


def must_be_rewritten(target: Any) -> bool:
    """Whether the table needs the exporter to take an operator apart, or to turn one that works in place into one that does not."""
    in_place = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target is not aten.detach_.default
    return target in SPELLED_OUT or in_place


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("PRIVINF_DEBUG", "") not in ("", "0")


def shown(error: Exception) -> Exception | None:
    """What to raise from: torch's exception with its pages of traceback is for debugging alone."""
    return error if debugging() else None


def first_line(error: BaseException) -> str:
    """An error as one short line with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def place_in(module: nn.Module, error: BaseException) -> str:
    """` in encoder.0 (Layer), net.py:12`: the innermost part of the module that was running, and the last line of its own code."""
    names = {id(part): name for name, part in module.named_modules()}
    inner, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        own = frame.f_locals.get("self")
        if names.get(id(own)):
            inner = f"{names[id(own)]} ({type(own).__name__})"
        if not code.co_filename.startswith(OTHERS):
            line = f"{Path(code.co_filename).name}:{number}"
    return f" in {', '.join(part for part in (inner, line) if part)}" if inner or line else ""


def _why(error: Exception) -> tuple[str, str]:
    """What is wrong, and what to do."""
    text = f"{type(error).__name__}: {error}"
    if "data-dependent" in text or "DataDependent" in text or "DynamicOutputShape" in text:
        return "what it does next depends on a value of its inputs", "its control flow and its shapes must not depend on the inputs' values"
    if "numpy" in text:
        return "it hands values to numpy", "compute with torch alone"
    return first_line(error), ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings, log and dumps of graphs."""
    if debugging():
        yield
        return
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            log.setLevel(level)
