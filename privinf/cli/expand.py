"""Options that are dataclasses: one decorator makes their fields options of a verb, and hands the verb the dataclasses, filled."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from privinf.setting import Setting, settings_of

_MADE = object()
Verb = TypeVar("Verb", bound=Callable[..., None])


def expand(*, without: Collection[str] = ()) -> Callable[[Verb], Verb]:
    """For a verb with parameters that are dataclasses: each of their fields that has a `Setting`, but those in `without`, is an option.

    A model of pydantic's is one too, and is made by its `checked`. A parameter that is an option itself has a
    `Setting` too, or what Typer wants. Where one that is a dataclass has a default, that object's values are this verb's defaults.
    """

    def decorate(verb: Verb) -> Verb:
        hints, own = get_type_hints(verb, include_extras=True), settings_of(verb)
        options: list[Parameter] = []
        groups: dict[str, _Group] = {}
        for name, parameter in inspect.signature(verb).parameters.items():
            if _is_group(hints[name]):
                groups[name] = _Group.of(hints[name], parameter.default, without)
                options += groups[name].options()
            else:
                hint = _option(name, *own[name], parameter.default) if name in own else hints[name]
                options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hint))

        @functools.wraps(verb)
        def called(**values: Any) -> None:
            filled = {name: group.fill(values) for name, group in groups.items()}
            verb(**filled, **values)

        del called.__wrapped__  # Typer is to see the options, not what the verb takes
        called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        called.__annotations__ = {option.name: option.annotation for option in options}
        return called  # type: ignore[return-value]

    return decorate


@dataclass(frozen=True)
class _Group:
    """A parameter that is a dataclass: its type, its default if it has one, and what its options are called, {option: field}."""

    kind: Any
    given: Any
    fields: dict[str, str]

    @classmethod
    def of(cls, kind: Any, given: Any, without: Collection[str]) -> _Group:
        settings = settings_of(kind)
        return cls(kind, given, {setting.name or field: field for field, (_, setting) in settings.items() if field not in without})

    def options(self) -> Iterator[Parameter]:
        """In the fields' order. One whose field makes a default of its own has none, and None where it is not given."""
        settings, defaults = settings_of(self.kind), _defaults(self.kind)
        for name, field in self.fields.items():
            kind, setting = settings[field]
            default = defaults[field] if self.given is Parameter.empty else getattr(self.given, field)
            if defaults[field] is _MADE:
                kind, default = kind | None, None
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=_option(name, kind, setting, default))

    def fill(self, values: dict[str, Any]) -> Any:
        """The object; takes what it is made of out of the values."""
        defaults = _defaults(self.kind)
        taken = {field: values.pop(option) for option, field in self.fields.items()}
        taken = {field: value for field, value in taken.items() if value is not None or defaults[field] is not _MADE}
        before = {} if self.given is Parameter.empty else {field: getattr(self.given, field) for field in defaults}
        return getattr(self.kind, "checked", self.kind)(**{**before, **taken})


def _is_group(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields")


def _defaults(kind: Any) -> dict[str, Any]:
    """Of every field; `_MADE` where it makes one, Parameter.empty where it has none."""
    if not dataclasses.is_dataclass(kind):
        return {name: Parameter.empty if field.is_required() else field.default for name, field in kind.model_fields.items()}
    found = {}
    for field in dataclasses.fields(kind):
        default = Parameter.empty if field.default is dataclasses.MISSING else field.default
        found[field.name] = default if field.default_factory is dataclasses.MISSING else _MADE
    return found


def _option(name: str, kind: Any, setting: Setting, default: Any) -> Any:
    """As Typer wants it. What is off can be turned on; what is on without being asked for can be turned off."""
    word = name.replace("_", "-")
    words = f"--{word}/--no-{word}" if default is True else f"--{word}"
    if setting.choices:
        kind = Literal[setting.choices]
    return Annotated[kind, typer.Option(words, help=setting.help, metavar=setting.metavar, min=setting.least, max=setting.most)]
