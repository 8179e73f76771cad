"""`--config FILE.yaml`: every option of a verb, by its name; what the command line says wins.

timeout: 30
max-new-tokens: 16
serve:                  # for this verb alone
  listen: 0.0.0.0:7000
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.cli import common
from protocols.errors import ConfigError

LIMIT = 1 << 20
_NEVER = ("help", "config")
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
    from privinf.cli.app import VERBS

    tables = [name for name in VERBS if isinstance(_document(file).get(name), dict)]
    chosen = [" ".join(verb)] if verb else [name for table in tables for name in _commands_of(table)]
    if not chosen:
        raise ConfigError(f"{file}: there is no table for a verb", remedy="name the verb: privinf config show FILE VERB")
    found = {name: _options_of(name, file, tuple(VERBS)) for name in chosen}
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
    from privinf.cli.app import load_verb

    inner = getattr(load_verb(verb), "commands", None)
    return [verb] if inner is None else [f"{verb} {name}" for name in inner]


def _options_of(words: str, file: Path, verbs: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """{option: {`value`, `from`: `file`, `default` or, where it is required, `nowhere`}} of one verb; ConfigError as at its call."""
    from privinf.cli.app import State, load_verb, root

    context: Any = typer.Context(typer.main.get_command(root), info_name="privinf", obj=State())
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
        if param.name in (*_NEVER, "as_json", "debug"):
            continue
        given = context.default_map.get(param.name)
        value = param.get_default(context) if given is None else given
        origin = "file" if given is not None else "nowhere" if param.required else "default"
        if param.name in _HIDDEN and given is not None:
            value = "(hidden)"
        result[param.opts[0].lstrip("-")] = {"value": str(value) if isinstance(value, Path) else value, "from": origin}
    return result


def apply_config(context: typer.Context, path: Path, verbs: tuple[str, ...]) -> None:
    """Makes the file's values the defaults of this verb's options; ConfigError names the key that is wrong."""
    groups = context.command_path.split()[1:]  # `privinf keys init`: keys, init
    values = _values(path, groups, verbs)
    known = {param.name: param for param in context.command.params if param.name and param.name not in _NEVER}
    names: dict[str, str] = {}
    for name, param in known.items():
        names |= {option.lstrip("-").replace("-", "_"): name for option in param.opts}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        found = names.get(key.replace("-", "_"))
        if found is None:
            near = difflib.get_close_matches(key.replace("-", "_"), names, 1)
            listed = ", ".join(sorted(name.replace("_", "-") for name in names))
            raise ConfigError(
                f"{path}: there is no option {key!r} for `{' '.join(['privinf', *groups])}`",
                remedy=f"perhaps {near[0].replace('_', '-')!r} is meant" if near else f"its options are {listed}",
            )
        param = known[found]
        flag = bool(getattr(param, "is_flag", False))
        try:
            plain = _plain(value, flag=flag, several=bool(getattr(param, "multiple", False)))
            param.process_value(context, plain)
        except (ValueError, typer.BadParameter) as error:
            message = error.message if isinstance(error, typer.BadParameter) else str(error)
            raise ConfigError(f"{path}: {key}: {message}".rstrip(".")) from None
        defaults[found] = plain
    context.default_map = {**(context.default_map or {}), **defaults}


def _values(path: Path, groups: list[str], verbs: tuple[str, ...]) -> dict[str, Any]:
    """The file's entries for this verb: those of the top level, then those under the verb's name."""
    found = _document(path)
    result: dict[str, Any] = {}
    level, place = found, str(path)
    for group in [*groups, None]:
        if not isinstance(level, dict) or not all(isinstance(key, str) for key in level):
            raise ConfigError(f"{place}: not a table of options", remedy="write one `option: value` a line")
        inner = {key for key, value in level.items() if isinstance(value, dict)}
        strangers = inner - {*verbs, *groups}
        if strangers:
            raise ConfigError(f"{place}: {sorted(strangers)[0]!r} is no verb", remedy=f"verbs are {', '.join(verbs)}")
        result |= {key: value for key, value in level.items() if key not in inner}
        place, level = f"{place}: {group}", level.get(group, {}) if group in inner else {}
    return result


def _document(path: Path) -> Any:
    """The whole file; ConfigError if it is not YAML, or not a table."""
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(LIMIT + 1)
        if len(text) > LIMIT:
            raise ConfigError(f"{path}: larger than {LIMIT} bytes", remedy="give a file of options")
        found = yaml.safe_load(text.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="give --config a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text", remedy="give --config a YAML file") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not YAML{where}", remedy="write one `option: value` a line") from None
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path}: not a table of options", remedy="write one `option: value` a line")
    return found or {}


def _plain(value: Any, *, flag: bool, several: bool) -> Any:
    """A YAML value as the command line would hold it: text, or true and false for a flag."""
    if flag:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if isinstance(value, list):
        texts = [_text(item) for item in value]
        return texts if several else ",".join(texts)
    return [_text(value)] if several else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be a text, a number or a list of them")
    return str(value)
