"""Trains the tiny world as one process of several, started by torchrun. Usage: fellow.py WORK RESULT [KILL_AT]

Writes the loss and the gradients of each step, and the trained weights. With KILL_AT, the second process dies by
SIGKILL after that step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.train.helpers import Body, Plain, run, state

from foveal.core.method import Recipe
from foveal.train import loop
from foveal.train.events import Event

RECIPE = Recipe(epochs=4, batch_size=9, lr=0.05, optimizer="sgd", augment="light")
"""24 images: batches of eight, in which two processes have equal shares, and three in which they have not."""


class Still(Body):
    """Without dropout, whose masks depend on how a batch is dealt out. With batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self[-1] = nn.Identity()


def recorded(work: Path, on_step: Callable[[int], None] = lambda step: None, **extra: Any) -> dict[str, Tensor]:
    """One run: loss and gradients per step, validation loss per epoch, weights."""
    found: dict[str, Tensor] = {}
    model: list[nn.Module] = []
    losses: dict[int, float] = {}

    class Seen(Plain):
        def attach(self, backbone: Any, classes: int) -> Any:
            model.append(super().attach(backbone, classes))
            return model[0]

    def tell(event: Event) -> None:
        if event["event"] == "step":
            losses[event["step"]] = event["loss"]
            on_step(event["step"])

    def keep(optimizer: Any, *_: Any) -> None:
        number = len([name for name in found if name.startswith("gradient.head.bias")])
        for name, parameter in model[0].named_parameters():
            found[f"gradient.{name}.{number:03}"] = parameter.grad.detach().clone().contiguous()

    original = loop.make_optimizer

    def watched(*arguments: Any) -> Any:
        optimizer = original(*arguments)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    loop.make_optimizer = watched
    try:
        recipe = extra.pop("recipe", RECIPE)
        result = run(work, recipe, seed=3, body=Still, method=Seen(recipe), on_event=tell, **extra)
    finally:
        loop.make_optimizer = original
    found |= {f"weight.{name}": tensor.contiguous() for name, tensor in state(result).items()}
    found["losses"] = torch.tensor([losses[step] for step in sorted(losses)])
    found["history"] = torch.tensor([[each["train_loss"], each["val_loss"]] for each in result.history])
    return found


def main(work: Path, result: Path, kill_at: int | None = None) -> None:
    def deadly(step: int) -> None:
        if step == kill_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    found = recorded(work, deadly)
    if os.environ["RANK"] == "0":
        save_file(found, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
