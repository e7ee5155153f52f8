"""Diffusion as plain functions of a noise predictor eps(x, t, c): DDIM in both directions, guidance.

With a the cumulative product of 1 - beta, a noisy image is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) n. Levels are counted
from 0 (no noise, a = 1) to `steps` (a = alphas[T - 1]); level k > 0 is timestep round(k T / steps) - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Eps = Callable[[Tensor, int, Tensor], Tensor]
"""Noise [B, C, h, w] in x [B, C, h, w] at timestep t, under a condition of length B or 1."""


def timestep(level: int, steps: int, length: int) -> int:
    """The timestep of a level; the clean level 0 is told as timestep 0, the least noise a network knows."""
    return max(0, round(level * length / steps) - 1)


def alpha(alphas: Tensor, level: int, steps: int) -> float:
    return 1.0 if level == 0 else float(alphas[timestep(level, steps, len(alphas))])


def noisy(x0: Tensor, noise: Tensor, a: float) -> Tensor:
    return math.sqrt(a) * x0 + math.sqrt(1 - a) * noise


def clean(x: Tensor, eps: Tensor, a: float) -> Tensor:
    """The image that x [B, C, h, w] would be if `eps` were its noise."""
    return (x - math.sqrt(1 - a) * eps) / math.sqrt(a)


def move(x: Tensor, eps: Tensor, a: float, to: float) -> Tensor:
    """One deterministic DDIM step (Song et al. 2021, eq. 12 with eta = 0) from a level to any other, either way."""
    return noisy(clean(x, eps, a), eps, to)


def guided(eps: Eps, scale: float, empty: Tensor) -> Eps:
    """Classifier-free guidance (Ho and Salimans 2022): eps(empty) + scale (eps(c) - eps(empty)).

    A scale of 1 asks the predictor once.
    """
    if scale == 1:
        return eps

    def predict(x: Tensor, t: int, c: Tensor) -> Tensor:
        nothing = eps(x, t, empty)
        return nothing + scale * (eps(x, t, c) - nothing)

    return predict


def backwards(eps: Eps, alphas: Tensor, x0: Tensor, c: Tensor, steps: int, level: int) -> list[Tensor]:
    """DDIM run backwards: the images at levels 0 (x0 itself) to `level`, each from the one before."""
    found = [x0]
    for k in range(level):
        noise = eps(found[-1], timestep(k, steps, len(alphas)), c)
        found.append(move(found[-1], noise, alpha(alphas, k, steps), alpha(alphas, k + 1, steps)))
    return found


def forwards(
    eps: Eps,
    alphas: Tensor,
    x: Tensor,
    c: Tensor,
    steps: int,
    level: int,
    after: Callable[[Tensor, int], Tensor] = lambda x, level: x,
) -> Tensor:
    """DDIM from `level` down to 0; `after` changes the image at each level that is reached."""
    for k in range(level, 0, -1):
        noise = eps(x, timestep(k, steps, len(alphas)), c)
        x = after(move(x, noise, alpha(alphas, k, steps), alpha(alphas, k - 1, steps)), k - 1)
    return x
