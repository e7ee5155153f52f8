"""`foveal samples`: the data sets that packages ship."""

from __future__ import annotations

from foveal.verbs._results import Result, table


def samples() -> Result:
    """List the sample data sets with their licences; use one as DATA: sample:NAME.

    Example: foveal samples
    """
    from foveal.data.samples import samples as rows

    return Result(rows(), lambda found: table(found, ["name", "images", "classes", "licence", "installed"]))
