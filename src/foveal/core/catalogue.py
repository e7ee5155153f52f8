"""Finds methods by their file name and imports them when asked; nobody edits a list.

The name of a method is its file's: `methods/adapt/nn_revisit.py` holds the class `NnRevisit`, called
`nn-revisit` on the command line, in its card, its test and its docs page. Third parties register a class
under the entry point group `foveal.methods`.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from foveal.core.errors import UsageError
from foveal.core.options import parse_options, split_choice

if TYPE_CHECKING:
    from foveal.core.method import Method

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def families() -> dict[str, str]:
    """Every built-in method's name and its family, in alphabetical order, without importing one."""
    files = sorted(PACKAGE.glob("methods/*/[!_]*.py"), key=lambda file: file.stem)
    return {file.stem.replace("_", "-"): file.parent.name for file in files}


@cache
def plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="foveal.methods")}


def names(family: str | None = None) -> list[str]:
    """Names of all methods, or of one family's."""
    built_in = [name for name, room in families().items() if family in (None, room)]
    others = [name for name in plugins() if family is None or get(name).spec.family == family]
    return sorted({*built_in, *others})


def get(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UsageError: no method has that name; the nearest names are shown.
    """
    if name in families():
        stem = name.replace("-", "_")
        module = importlib.import_module(f"foveal.methods.{families()[name]}.{stem}")
        return cast("type[Method]", getattr(module, "".join(part.title() for part in stem.split("_"))))
    if name in plugins():
        return cast("type[Method]", plugins()[name].load())
    near = difflib.get_close_matches(name, [*families(), *plugins()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`foveal methods` lists them"
    raise UsageError(f"no method '{name}': {hint}")


def create(choice: str, **overrides: Any) -> Method:
    """The method that `NAME` or `NAME:key=value,key=value` names, with its options set."""
    name, given = split_choice(choice)
    cls = get(name)
    return cls(parse_options(cls.Options, {**given, **overrides}, name))
