"""Teaching a small diffusion model of pixels, by the loop: it predicts noise, sometimes without knowing the class."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from foveal.backbones.painter import PixelPainter, Plan
from foveal.core.errors import DataError
from foveal.core.method import Recipe, Spec, Trained
from foveal.core.seeds import derive, generator, seed_everything
from foveal.train.events import Listener, silent
from foveal.train.feed import Feed
from foveal.train.loop import train

UNTOLD = 0.1
"""Share of examples whose class is left out, for guidance."""


class Denoising(Trained):
    """The squared error of the noise (Ho et al. 2020, eq. 14)."""

    spec: ClassVar[Spec] = Spec(family="generate", title="Denoising", year=2020, arxiv="2006.11239")
    name: ClassVar[str] = "denoising"

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`batch` has x [B, C, S, S] (noisy), noise of the same shape, t [B] and classes [B]."""
        return {"loss": F.mse_loss(model(batch["x"], batch["t"], batch["classes"]), batch["noise"])}


class NoisyImages(Feed):
    """Images, each with fresh noise of a random level.

    Args:
        draw: number of an example and its own generator -> (image [C, S, S] in -1..1, class).
        name: tells what is drawn apart from other drawings.
    """

    def __init__(
        self, painter: PixelPainter, count: int, draw: Callable[[int, np.random.Generator], tuple[np.ndarray, int]],
        name: str,
    ) -> None:  # fmt: skip
        self.alphas, self.none = painter.alphas.numpy(), int(painter.empty)
        self.count, self.draw, self.name = count, draw, name

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, label = self.draw(index, rng)
        t = int(rng.integers(len(self.alphas)))
        noise = rng.standard_normal(image.shape)
        x = np.sqrt(self.alphas[t]) * image + np.sqrt(1 - self.alphas[t]) * noise
        told = self.none if rng.random() < UNTOLD else label
        return {
            "x": x.astype(np.float32),
            "noise": noise.astype(np.float32),
            "t": np.asarray(t),
            "classes": np.asarray(told),
        }

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.name, self.count)).encode()).hexdigest()


def teach(
    plan: Plan,
    draw: Callable[[int, np.random.Generator], tuple[np.ndarray, int]],
    *,
    name: str,
    seed: int,
    steps: int,
    batch: int = 64,
    lr: float = 2e-3,
    on_event: Listener = silent,
) -> PixelPainter:
    """A painter taught from nothing; see `NoisyImages` for `draw`. Runs on the CPU.

    Raises:
        DataError: `draw` gives images that the plan does not speak of.
    """
    seed_everything(derive(seed, "painter"))
    painter = PixelPainter(plan)
    shape = draw(0, generator(seed, "shape"))[0].shape
    if shape != (plan.channels, plan.size, plan.size):
        raise DataError(f"images of shape {shape}, expected {(plan.channels, plan.size, plan.size)}")
    feed = NoisyImages(painter, steps * batch, draw, name)
    recipe = Recipe(epochs=1, batch_size=batch, lr=lr, weight_decay=0.0, augment="none")
    with tempfile.TemporaryDirectory() as work:
        result = train(
            Denoising(), painter, feed, seed, recipe=recipe, device="cpu", work=Path(work), on_event=on_event
        )
    return result.model.requires_grad_(False)
