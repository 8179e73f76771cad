"""What a field of a dataclass is to a person who sets it: `chunk: Annotated[int, Setting("...", "N", least=0)] = 0`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Setting:
    """A help text, what stands for the value in it, and bounds, which belong to the range; or else the `choices`.

    `name` is what the command line calls it, where that is not the field's.
    """

    help: str
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    name: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """A model of pydantic's holds its field to the bounds."""
        bounds = {"ge": self.least, "le": self.most}
        return {**handler(source), **{word: bound for word, bound in bounds.items() if bound is not None}}


def settings_of(holder: Any) -> dict[str, tuple[Any, Setting]]:
    """{field or parameter: type, setting} of those that have one, in their order."""
    found = {}
    for name, hint in get_type_hints(holder, include_extras=True).items():
        for setting in getattr(hint, "__metadata__", ()):
            if isinstance(setting, Setting):
                found[name] = (hint.__origin__, setting)
    return found
