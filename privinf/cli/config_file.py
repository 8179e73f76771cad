"""`--config FILE.yaml`: every option of a verb, by its name; what the command line says wins.

timeout: 30
max-new-tokens: 16
serve:                  # for this verb alone
  listen: 0.0.0.0:7000
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer

from protocols.errors import ConfigError

LIMIT = 1 << 20
NEVER = ("help", "config")
"""Options that no file gives."""


def apply_config(context: typer.Context, path: Path, verbs: tuple[str, ...]) -> None:
    """Makes the file's values the defaults of this verb's options; ConfigError names the key that is wrong."""
    groups = context.command_path.split()[1:]  # `privinf keys init`: keys, init
    values = _values(path, groups, verbs)
    known = {param.name: param for param in context.command.params if param.name and param.name not in NEVER}
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
    found = read_table(path)
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


def read_table(path: Path) -> Any:
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
