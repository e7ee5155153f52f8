"""Registration with timm that gives way: a name that timm has itself stays timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import is_model, model_entrypoint
from timm.models import register_model as register_with_timm


def register_model(build: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function `NAME(pretrained=False, **kwargs) -> nn.Module`, as timm's own.

    The module defines `default_cfgs` (by `timm.models.generate_default_cfgs`) above its first use.

    Returns:
        The function that timm has under this name from now on: the given one, or timm's if it had one.
    """
    if is_model(build.__name__):
        held = model_entrypoint(build.__name__)
        if not held.__module__.startswith("foveal."):
            return held
    return register_with_timm(build)
