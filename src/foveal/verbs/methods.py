"""`foveal methods`: what can be chosen, with its options."""

from __future__ import annotations

from typing import Annotated, Any

from foveal.verbs._results import Result, table


def methods(
    name: Annotated[str | None, "Show one method's options."] = None,
    *,
    family: Annotated[str | None, "Only this family: adapt, explain, shrink, ..."] = None,
) -> Result:
    """List the methods with family, paper, needs and options.

    Example: foveal methods vpt
    """
    from foveal.core import catalogue
    from foveal.core.options import describe_options

    names = catalogue.names(family) if name is None else [name]
    rows: list[dict[str, Any]] = []
    for each in names:
        cls = catalogue.get(each)
        spec = cls.spec
        rows.append(
            {
                "name": each,
                "family": spec.family,
                "title": spec.title,
                "year": spec.year,
                "arxiv": spec.arxiv,
                "needs": sorted(spec.needs),
                "tasks": list(spec.tasks),
                "options": describe_options(cls.Options),
            }
        )
    return Result(rows, one if name else every)


def every(rows: list[dict[str, Any]]) -> str:
    return table(rows, ["name", "family", "year", "arxiv", "needs", "title"])


def one(rows: list[dict[str, Any]]) -> str:
    row = rows[0]
    head = f"{row['name']} ({row['family']}, {row['year']}): {row['title']}"
    return f"{head}\n{table(row['options'], ['name', 'type', 'default', 'range', 'help'])}"
