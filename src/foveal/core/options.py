"""Options of a method: one frozen dataclass, read from `key=value,key=value`, refused all at once when wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from foveal.core.errors import UsageError

T = TypeVar("T")


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field of an Options class: its default, one line of help, and pydantic bounds (`ge`, `gt`, `le`, `lt`)."""
    return Field(default, description=help, **bounds)


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def options(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, validated dataclass that refuses unknown keys."""
    make = cast(Callable[[type[T]], type[T]], dataclass(frozen=True, config=ConfigDict(extra="forbid")))
    return make(cls)


def parse_options(cls: type[T], given: Mapping[str, Any], owner: str) -> T:
    """Build `cls` from strings or values.

    Raises:
        UsageError: naming every wrong or unknown key at once.
    """
    known = {field.name: field.type for field in dataclasses.fields(cast(Any, cls))}
    try:
        return TypeAdapter(cls).validate_python(dict(given))
    except ValidationError as error:
        faults: list[str] = []
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"])
            if key in known:
                faults.append(f"{key}={fault['input']}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
            else:
                faults.append(f"{key}: unknown")
        allowed = ", ".join(known) or "none"
        raise UsageError(f"options of {owner}: {'; '.join(faults)} (options: {allowed})") from None


def split_choice(text: str) -> tuple[str, dict[str, str]]:
    """Split `NAME:key=value,key=value` into the name and its options."""
    name, _, rest = text.partition(":")
    given: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"'{item}' in '{text}' is not key=value: write NAME:key=value,key=value")
        given[key.strip()] = value.strip()
    return name.strip(), given


def options_to_dict(chosen: Any) -> dict[str, Any]:
    return dataclasses.asdict(chosen)


def describe_options(cls: type[Any]) -> list[dict[str, Any]]:
    """One row per option: name, type, default, range, help. The command line, docs and sweeps read this."""
    schema = TypeAdapter(cls).json_schema()
    rows: list[dict[str, Any]] = []
    for name, field in cast("dict[str, dict[str, Any]]", schema.get("properties", {})).items():
        bounds = {
            "minimum": ">= {}",
            "exclusiveMinimum": "> {}",
            "maximum": "<= {}",
            "exclusiveMaximum": "< {}",
        }
        either = cast("list[dict[str, Any]]", field.get("anyOf", []))  # a type, or null
        field = next((field | kind for kind in either if kind.get("type") != "null"), field)
        limits = [form.format(field[key]) for key, form in bounds.items() if key in field]
        if "enum" in field:
            limits.append("one of " + ", ".join(json.dumps(value) for value in field["enum"]))
        rows.append(
            {
                "name": name,
                "type": str(field.get("type", "any")),
                "default": field.get("default"),
                "range": ", ".join(limits),
                "help": field.get("description", ""),
            }
        )
    return rows
