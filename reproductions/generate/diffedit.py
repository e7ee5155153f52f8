"""3 becomes 8 in drawings of 16 x 16 pixels: digits of seven strokes, each by its own hand, whose 8 is known.

A small class-conditional diffusion model is taught on all ten digits. DiffEdit with its own mask, with a mask of ones
(encode and decode), and with a mask of ones from fresh noise (SDEdit) edit the same drawings with the same strength.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.painter import Plan
from foveal.data.glyphs import STROKES, glyph
from foveal.methods.generate.diffedit import Diffedit, Options
from foveal.train.painter import teach

SIZE, STEPS, TEST = 16, 250, 16
CHANGED = 0.15
"""Of the brightness range: what counts as a changed pixel."""


def hands(digit: str, seed: int, count: int) -> Tensor:
    """The same test hands' drawings of a digit [count, 1, 16, 16] in -1..1; never seen in training."""
    drawn = np.stack([glyph(digit, hand, seed=10_000 + seed, size=SIZE) for hand in range(count)])
    return torch.from_numpy(2 * drawn - 1)[:, None]


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    classes, count = tuple(STROKES), 2 if tiny else TEST

    def draw(index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        label = index % len(classes)
        return 2 * glyph(classes[label], int(rng.integers(2**31)), seed, SIZE)[None] - 1, label

    plan = Plan(classes, SIZE, widths=(24, 48))
    painter = teach(plan, draw, name="glyphs", seed=seed, steps=2 if tiny else STEPS, batch=32)
    three, eight = hands("3", seed, count), hands("8", seed, count)
    strokes = (eight - three).abs() / 2 > CHANGED
    common = {"steps": 4 if tiny else 40, "strength": 0.6, "guidance": 3.0, "maps": 2 if tiny else 10}
    everywhere = torch.ones_like(three, dtype=torch.bool)
    values: dict[str, float] = {"input.inside": gap(three, eight, strokes)}
    edits = {
        "masked": (Diffedit(Options(**common)), None),
        "whole": (Diffedit(Options(**common)), everywhere),
        "sdedit": (Diffedit(Options(**common, start="noise")), everywhere),
    }
    for name, (method, mask) in edits.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = method.edit(painter, three, painter.condition("8"), painter.condition("3"), mask=mask, seed=seed)
        changed = (made.x - three).abs() / 2 > CHANGED
        values[f"{name}.outside"] = float((changed & ~strokes).sum() / (~strokes).sum())
        values[f"{name}.inside"] = gap(made.x, eight, strokes)
        if mask is None:
            both = (made.mask & strokes).sum()
            values["mask.recall"] = float(both / strokes.sum())
            values["mask.precision"] = float(both / made.mask.sum().clamp_min(1))
    values["masked.wins"] = float(values["masked.outside"] < values["whole.outside"])
    return values


def gap(x: Tensor, truth: Tensor, where: Tensor) -> float:
    """Mean difference of brightness from the truth, in 0..1, on the strokes that make a 3 an 8."""
    return float(((x.clamp(-1, 1) - truth).abs() / 2)[where].mean())
