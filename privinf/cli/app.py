"""The command line: finds the verb, imports it alone, and turns what it raises into one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from privinf.cli.signals import Stopped, install
from privinf.cli.verbs import COMMAND, VERBS, Invocation, add_common, load_verb, log_to_stderr
from privinf.forking import CHANNEL
from protocols.errors import PrivinfError

DONE, DEFECT, USAGE, PROTOCOL, BROKEN_PIPE = 0, 1, 2, 4, 141


EXTRAS = dict.fromkeys(("fastapi", "uvicorn", "h11", "sse_starlette", "starlette", "jinja2"), "gateway") | {"matplotlib": "training"}
"""Which extra brings what is not always installed."""
COMPLETE = "_PRIVINF_COMPLETE"
"""In the environment, by the line that `privinf --install-completion` puts into a shell's start-up file."""


class Verbs(typer.core.TyperGroup):
    """Lists the verbs from the table above; imports only the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        add_common(self)
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


root = typer.Typer(cls=Verbs)


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
    words = list(sys.argv[1:] if arguments is None else arguments)
    state = Invocation()
    COMMAND.set(tuple(words))
    warnings.simplefilter("ignore")
    log_to_stderr(debug=False)
    try:
        if CHANNEL not in os.environ:  # which forks, and so has no thread that watches for signals
            install()
        command = typer.main.get_command(root)
        for param in command.params:  # those of completion, which Typer adds, too
            param.metavar = ""
        if COMPLETE in os.environ:  # a shell asks what may come next, and is told nothing else
            return int(command.main(words, "privinf", complete_var=COMPLETE, standalone_mode=False) or DONE)
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
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return USAGE, f"this needs {error.name}, which is not installed; pip install 'privinf[{extra}]'"
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
