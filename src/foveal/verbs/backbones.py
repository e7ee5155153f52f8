"""`foveal backbones`: which backbones can be had, and where their weights come from."""

from __future__ import annotations

from typing import Annotated

from foveal.verbs._results import Result, table


def backbones(
    pattern: Annotated[str | None, "Only names with this pattern, such as 'vit_*'."] = None,
) -> Result:
    """List timm backbones with the origin of their weights: shipped by a package, cached, or on the Hub.

    Example: foveal backbones 'tf_efficientnet_lite*'
    """
    from foveal.backbones.adapter import list_backbones

    rows = list_backbones(pattern)
    return Result(rows, lambda found: table(found, list(found[0]) if found else []))
