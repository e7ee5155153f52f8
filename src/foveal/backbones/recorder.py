"""The layer recorder: what named modules of a network answer while it runs, with nothing left behind."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from foveal.core.errors import UsageError


@contextmanager
def recording(module: nn.Module, names: Iterable[str], *, graph: bool = False) -> Generator[dict[str, Any]]:
    """Within the block, the outputs of the modules called `names`, by name; a later call replaces an earlier one's.

        with recording(model, ["layer3", "layer4"]) as seen:
            model(images)
        seen["layer4"]  # [B, C, h, w]

    Without `graph` the block runs under `torch.no_grad()`. With it, outputs stay part of the autograd graph, for
    methods that differentiate with respect to them. The hooks are gone after the block, also when it raises.

    Raises:
        UsageError: no module has one of the names.
    """
    seen: dict[str, Any] = {}
    modules = {name: find(module, name) for name in names}
    with ExitStack() as stack:
        for name, each in modules.items():

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                seen[name] = output

            stack.callback(each.register_forward_hook(keep).remove)
        if not graph:
            stack.enter_context(torch.no_grad())
        yield seen


def find(module: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        UsageError: there is none; its nearest parent's children are shown.
    """
    at, reached = module, ""
    for step in filter(None, name.split(".")):
        children = dict(at.named_children())
        if step not in children:
            where = f"'{reached}' has" if reached else "there are"
            raise UsageError(f"no layer '{name}': {where} {', '.join(children) or 'no layers inside'}")
        at, reached = children[step], f"{reached}.{step}".strip(".")
    return at
