"""The command line: finds the verb, imports it alone, and turns what it raises into one line on stderr and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from privinf.cli.config import apply_config
from privinf.cli.signals import Stopped, install
from protocols.errors import PrivinfError

DONE, DEFECT, USAGE, PROTOCOL, BROKEN_PIPE = 0, 1, 2, 4, 141

VERBS = {
    "run": "Start dealer, server and client on this machine and generate text.",
    "dealer": "Be the dealer: hand out correlated randomness to pairs of parties.",
    "serve": "Be the server: answer clients with a model that they never see.",
    "generate": "Be the client: generate text from a prompt that the server never sees.",
    "prepare": "Prepare queries ahead of time, so that they pay the online part only.",
    "gateway": "Answer OpenAI-compatible requests on this machine, and ask the server privately.",
    "keys": "Make, show and renew the certificates by which the parties know each other.",
    "convert": "Lower a checkpoint directory to a model that the parties can run.",
    "explain": "Predict bytes, rounds and work per layer and operator, without running anything.",
    "compare": "Run one private and one float pass on the same prompt, and show the errors.",
    "doctor": "Check the installation, the devices, the clock, the certificates and the peers.",
    "config": "Check a configuration file, and show what it means to a verb.",
    "cache": "List and remove what is kept between runs.",
    "train": "Train a variant of the ladder on text or code.",
    "analyze": "Show the entropy of a model's heads, and which FFNs it can do without.",
}


@dataclass
class State:
    """What the verbs tell `main`."""

    debug: bool = False


def _set_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        apply_config(context, path, tuple(VERBS))
    return path


def _set_debug(context: typer.Context, debug: bool) -> bool:
    if debug:
        context.find_object(State).debug = True  # type: ignore[union-attr]
        os.environ["PRIVINF_DEBUG"] = "1"  # for the parties that `run` starts
        warnings.simplefilter("default")
        _log_to_stderr(debug=True)
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


def _log_to_stderr(*, debug: bool) -> None:
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


def _add_common(command: Any) -> None:
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
        _add_common(each)


def load_verb(name: str) -> Any:
    """Imports the module of a verb: a Typer `app`, or a function of the verb's name."""
    module = importlib.import_module(f"privinf.cli.{name}")
    command = typer.main.get_command(module.app) if hasattr(module, "app") else _command(getattr(module, name))
    command.name = name
    _add_common(command)
    return command


class Verbs(typer.core.TyperGroup):
    """Lists the verbs from the table above; imports only the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        _add_common(self)
        for name, summary in VERBS.items():
            self.add_command(typer.core.TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb itself in place of its entry in the list."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name else command, rest


def _show_version(show: bool) -> None:
    if show:
        from privinf import __version__

        typer.echo(f"privinf {__version__}")
        raise typer.Exit


root = typer.Typer(cls=Verbs, add_completion=False)


@root.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Secure two-party inference for softmax-only language models.

    The server holds the weights, the client holds the prompt, a dealer hands out
    randomness. The prompt stays with the client, the weights with the server.

    Example: privinf run models/pylib --prompt "def main("
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; its exit code: 0 done, 2 usage, configuration or checkpoint, 3 peer refused or unreachable, 4 protocol, 5 model."""
    state = State()
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.simplefilter("ignore")
    _log_to_stderr(debug=False)
    try:
        install()
        command = typer.main.get_command(root)
        with command.make_context("privinf", words, obj=state) as context:
            command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as end:
        return end.exit_code
    except BaseException as error:
        code, line = _verdict(error)
        if code == BROKEN_PIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        if state.debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        if line:
            print(f"privinf: {_one_line(line)}", file=sys.stderr)
        return code


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and message."""
    if isinstance(error, PrivinfError):
        return error.exit_code, str(error)
    if isinstance(error, Stopped):
        return error.exit_code, "interrupted" if error.exit_code == 130 else "terminated"
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (USAGE if error.code else DONE, str(error.code or ""))
    if isinstance(error, typer.TyperException):  # wrong usage
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "privinf"
        verb = path.removeprefix("privinf").strip()
        message = error.format_message().rstrip(". ").replace("Value error, ", "")
        return USAGE, f"{verb + ': ' if verb else ''}{message[:1].lower()}{message[1:]}; see `{path} --help`"
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, ""
    if isinstance(error, MemoryError):
        return PROTOCOL, "out of memory; use a smaller model or a shorter prompt"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return (USAGE if place else PROTOCOL), f"{place}{error.strerror or error}"
    return DEFECT, f"a defect in privinf: {type(error).__name__}: {error}; run again with --debug for the traceback, and report it"


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
