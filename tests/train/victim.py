"""Trains the tiny world in a process of its own, to be killed. Usage: victim.py WORK RESULT"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from foveal.core.method import Recipe
from foveal.train import loop
from foveal.train.events import Event

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.train.helpers import run, state

RECIPE = Recipe(epochs=40, batch_size=8, lr=0.01, augment="strong")


def tell(event: Event) -> None:
    if event["event"] == "step":
        print(event["step"], flush=True)


def main(work: Path, result: Path) -> None:
    torch.set_num_threads(1)
    loop.SAVE_EVERY_S = 0.02  # checkpoints inside epochs too
    print("ready", flush=True)
    trained = run(work, RECIPE, seed=3, on_event=tell)
    save_file({name: tensor.contiguous() for name, tensor in state(trained).items()}, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
