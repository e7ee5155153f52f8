"""`foveal backbones`: which backbones can be had, what they cost, and where their weights come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from foveal.core.progress import Progress
from foveal.verbs._results import Result, table

if TYPE_CHECKING:
    from typing import Any

ORIGINS = ("package", "cache", "hub", "none")
MOST = 100
"""How many backbones are counted or timed in one call: building one takes about half a second."""


def backbones(
    pattern: Annotated[str | None, "Only names with this pattern, such as 'vit_*'."] = None,
    *,
    weights: Annotated[
        str | None,
        "Only those whose weights are where it says: package (installed with one), cache, hub, or none.",
    ] = None,
    max_parameters: Annotated[float | None, "Only those with at most so many million parameters."] = None,
    measure: Annotated[bool, "Also time each on this machine's CPU: images a second."] = False,
    progress: Progress | None = None,
) -> Result:
    """List timm backbones with image size, parameters, multiply-accumulates, and the origin of their weights.

    Parameters (with the classifier) and multiply-accumulates of one image are counted without memory when at most a
    hundred backbones match, and kept in the cache.

    Example: foveal backbones 'tf_efficientnet_lite*'
    """
    from foveal.backbones.adapter import list_backbones
    from foveal.core.errors import UsageError

    progress = progress or Progress()
    if weights not in (None, *ORIGINS):
        raise UsageError(f"weights '{weights}': expected {', '.join(ORIGINS)}")
    rows = [row for row in list_backbones(pattern) if weights in (None, row["weights"])]
    if len(rows) > MOST and (max_parameters is not None or measure):
        raise UsageError(
            f"{len(rows):,} backbones match: to count or time them, give a pattern that matches at most {MOST}, "
            "such as 'convnext_*'"
        )
    if len(rows) <= MOST:
        rows = with_costs(rows, max_parameters, measure, progress)
    return Result(rows, lambda found: table(found, list(found[0]) if found else []))


def with_costs(
    rows: list[dict[str, Any]], max_parameters: float | None, measure: bool, progress: Progress
) -> list[dict[str, Any]]:
    """The rows with what they cost beside them, without those that have too many parameters."""
    from foveal.evaluate.architectures import architecture_cost, images_per_second

    found: list[dict[str, Any]] = []
    for done, row in enumerate(rows):
        progress.update("counting", done, len(rows))
        cost = architecture_cost(row["name"])
        if max_parameters is not None and (cost["parameters"] or 0) > 1e6 * max_parameters:
            continue
        speed = {"images_per_second": images_per_second(row["name"])} if measure else {}
        found.append({"name": row["name"], "size": row["size"], **cost, **speed, "weights": row["weights"]})
    progress.update("counting", len(rows), len(rows))
    return found
