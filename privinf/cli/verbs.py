"""The verbs: a line for each, and what all of them are made into, with the options that none writes by itself."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from privinf.cli.config_file import apply_config

VERBS = {
    "run": "Start dealer, server and client on this machine and generate text.",
    "dealer": "Be the dealer: hand out correlated randomness to pairs of parties.",
    "serve": "Be the server: answer clients with a model that they never see.",
    "generate": "Be the client: generate text from a prompt that the server never sees.",
    "prepare": "Prepare queries ahead of time, so that they pay the online part only.",
    "batch": "Answer a file of prompts into a file of replies, each once.",
    "gateway": "Answer OpenAI-compatible requests on this machine, and ask the server privately.",
    "keys": "Make, show and renew the certificates by which the parties know each other.",
    "convert": "Lower a checkpoint directory to a model that the parties can run.",
    "explain": "Predict bytes, rounds and work per layer and operator, without running anything.",
    "compare": "Run one private and one float pass on the same prompt, and show the errors.",
    "doctor": "Check the installation, the devices, the clock, the certificates and the peers.",
    "config": "Check a configuration file, and show what it means to a verb.",
    "cache": "List and remove what is kept between runs.",
    "train": "Train a variant of the ladder, or of another family, on text or code.",
    "analyze": "Show the entropy of a model's heads, and which FFNs it can do without.",
}


COMMAND: ContextVar[tuple[str, ...]] = ContextVar("COMMAND", default=())
"""The words of the command line, for a verb that starts itself again."""


@dataclass
class Invocation:
    """What the verbs tell `main`."""

    debug: bool = False


def _set_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        apply_config(context, path, tuple(VERBS))
    return path


def _set_debug(context: typer.Context, debug: bool) -> bool:
    if debug:
        context.find_object(Invocation).debug = True  # type: ignore[union-attr]
        os.environ["PRIVINF_DEBUG"] = "1"  # for the parties that `run` starts
        warnings.simplefilter("default")
        log_to_stderr(debug=True)
    return debug


def _show_help(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        typer.echo(context.get_help(), color=context.color)
        raise typer.Exit


class _OneLine(logging.Formatter):
    """A record without its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        return super().format(plain)


def log_to_stderr(*, debug: bool) -> None:
    """Sends what the program logs to standard error; with `debug` all of it, and tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    form = logging.Formatter if debug else _OneLine
    handler.setFormatter(form("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler], force=True)


def _everywhere(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE.yaml", callback=_set_config, is_eager=True, help="Options by name; the command line wins."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Tracebacks and a log on stderr.")] = False,
    help: Annotated[bool, typer.Option("--help", callback=_show_help, is_eager=True, help="Show this message and exit.")] = False,
) -> None:
    """The options that every verb has, though none is passed them; a group of verbs has the last one alone."""


def _command(function: Any) -> Any:
    app = typer.Typer()
    app.command()(function)
    return typer.main.get_command(app)


def add_common(command: Any) -> None:
    """To a verb, a group of them and what is in it."""
    inner = getattr(command, "commands", None)
    added = [
        param for param in _command(_everywhere).params if param.name == "help" or (inner is None and param.name in ("config", "debug"))
    ]
    command.no_args_is_help = False
    command.params = [*(param for param in command.params if param.name not in ("install_completion", "show_completion")), *added]
    for param in added:
        param.expose_value = False
    for param in command.params:
        if getattr(param, "is_flag", False):
            param.metavar = ""  # or a column of help says <bool>, though a flag takes no value
    for each in (inner or {}).values():
        add_common(each)


def load_verb(name: str) -> Any:
    """Imports the module of a verb: a Typer `app`, or a function of the verb's name."""
    module = importlib.import_module(f"privinf.cli.{name}")
    command = typer.main.get_command(module.app) if hasattr(module, "app") else _command(getattr(module, name))
    command.name = name
    add_common(command)
    return command
