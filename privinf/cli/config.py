"""`privinf config`: what a configuration file means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from privinf.cli import common
from privinf.cli.config_file import NEVER, apply_config, read_table
from privinf.cli.verbs import VERBS, load_verb
from protocols.errors import ConfigError

_HIDDEN = ("prompt", "prompt_ids", "api_key")

app = typer.Typer(help="Show what a configuration file means to a verb.\n\nExample: privinf config show privinf.yaml serve")


@app.callback()
def _group() -> None:
    pass


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A configuration file.")],
    verb: Annotated[list[str] | None, typer.Argument(metavar="VERB", help="One verb; default: all that the file has a table for.")] = None,
    as_json: common.Json = False,
) -> None:
    """Check a configuration file, and show every option of a verb as it would be, and where its value is from.

    Example: privinf config show privinf.yaml serve
    """
    tables = [name for name in VERBS if isinstance(read_table(file).get(name), dict)]
    chosen = [" ".join(verb)] if verb else [name for table in tables for name in _commands_of(table)]
    if not chosen:
        raise ConfigError(f"{file}: there is no table for a verb", remedy="name the verb: privinf config show FILE VERB")
    found = {name: options_of(name, file) for name in chosen}
    if as_json:
        common.write_json({"file": str(file), "verbs": found})
        return
    for name, options in found.items():
        typer.echo(f"{name}:")
        for option, entry in options.items():
            value = "required, and not given" if entry["from"] == "nowhere" else f"{_shown(entry['value'])}"
            typer.echo(f"  {option}: {value}" + ("  # default" if entry["from"] == "default" else ""))


def _shown(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def _commands_of(verb: str) -> list[str]:
    """The verb, or where it is a group, each of its commands."""
    inner = getattr(load_verb(verb), "commands", None)
    return [verb] if inner is None else [f"{verb} {name}" for name in inner]


def options_of(words: str, file: Path) -> dict[str, dict[str, Any]]:
    """{option: {`value`, `from`: `file`, `default` or, where it is required, `nowhere`}} of one verb; ConfigError as at its call."""
    verbs = tuple(VERBS)
    context: Any = typer.Context(typer.core.TyperGroup(name="privinf"), info_name="privinf")
    command: Any = None
    for place, word in enumerate(words.split()):
        inner = getattr(command, "commands", {})
        if word not in (verbs if place == 0 else inner):
            raise ConfigError(f"there is no verb {words!r}", remedy=f"verbs are {', '.join(verbs)}")
        command = load_verb(word) if place == 0 else inner[word]
        context = typer.Context(command, info_name=word, parent=context)
    if getattr(command, "commands", None):
        raise ConfigError(f"{words!r} is several verbs", remedy=f"name one of {', '.join(command.commands)} after it")
    apply_config(context, file, verbs)
    result = {}
    for param in command.params:
        if param.name in (*NEVER, "as_json", "debug"):
            continue
        given = context.default_map.get(param.name)
        value = param.get_default(context) if given is None else given
        origin = "file" if given is not None else "nowhere" if param.required else "default"
        if param.name in _HIDDEN and given is not None:
            value = "(hidden)"
        result[param.opts[0].lstrip("-")] = {"value": str(value) if isinstance(value, Path) else value, "from": origin}
    return result
