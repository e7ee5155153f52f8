"""Seeded procedural images. `garbage` makes pictures that no user's photo looks like, to choose an unknown score by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from foveal.core.seeds import generator


def garbage(n: int, size: int, seed: int) -> np.ndarray:
    """Pictures of nothing, uint8 [n, size, size, 3]: noise, gradients, stripes, checkerboards, blobs, flat colours.

    The KINDS take turns, a round in colours at random and a round in grey. Image i depends on the seed, the size and i
    alone.
    """
    images = np.empty((n, size, size, 3), np.uint8)
    for index in range(n):
        rng = generator(seed, "garbage", size, index)
        picture = KINDS[index % len(KINDS)](size, rng)
        if index // len(KINDS) % 2:
            picture = picture.mean(axis=2, keepdims=True)
        images[index] = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return images


def colours(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((count, 3))


def blend(weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights [size, size] in 0..1 between two colours at random."""
    low, high = colours(2, rng)
    return low + weight[..., None] * (high - low)


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in -0.5..0.5: (y, x), each [size, size]."""
    axis = (np.arange(size) + 0.5) / size - 0.5
    return axis[:, None] + np.zeros((1, size)), axis[None, :] + np.zeros((size, 1))


def along(size: int, rng: np.random.Generator) -> np.ndarray:
    """Distance from the centre along a direction at random, [size, size]."""
    y, x = grid(size)
    angle = rng.uniform(0, np.pi)
    return y * np.sin(angle) + x * np.cos(angle)


def noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Coloured noise with power falling as frequency^-a, a from 0 (white) to 4 (clouds)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) * frequency ** (-rng.uniform(0, 4) / 2)
    values = np.fft.irfft2(spectrum, s=(size, size))
    values -= values.mean(axis=(1, 2), keepdims=True)
    values /= 4 * values.std(axis=(1, 2), keepdims=True) + 1e-9
    return np.moveaxis(values, 0, -1) + rng.uniform(0.3, 0.7, 3)


def pixel_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Independent pixels, in squares of 1 to 16 pixels."""
    step = int(rng.choice([1, 2, 4, 8, 16]))
    cells = rng.random((-(-size // step), -(-size // step), 3))
    return cells.repeat(step, axis=0).repeat(step, axis=1)[:size, :size]


def gradient(size: int, rng: np.random.Generator) -> np.ndarray:
    return blend(np.clip(along(size, rng) / 1.4 + 0.5, 0, 1), rng)


def stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    wave = np.sin(2 * np.pi * (along(size, rng) * rng.uniform(2, size / 4 + 3) + rng.random()))
    return blend((wave > 0).astype(float) if rng.random() < 0.5 else wave / 2 + 0.5, rng)


def checkerboard(size: int, rng: np.random.Generator) -> np.ndarray:
    squares = rng.uniform(2, size / 4 + 3)
    y, x = grid(size)
    return blend((np.floor(y * squares) + np.floor(x * squares)) % 2, rng)


def blobs(size: int, rng: np.random.Generator) -> np.ndarray:
    """Soft or sharp discs on a flat ground."""
    y, x = grid(size)
    picture = np.broadcast_to(colours(1, rng)[0], (size, size, 3)).copy()
    for _ in range(int(rng.integers(3, 25))):
        centre, radius, softness = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.02, 0.25), rng.uniform(0.005, 0.1)
        distance = np.hypot(y - centre[0], x - centre[1]) - radius
        cover = (1 / (1 + np.exp(np.clip(distance / softness, -50, 50))))[..., None]
        picture += cover * (colours(1, rng)[0] - picture)
    return picture


def flat(size: int, rng: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(colours(1, rng)[0], (size, size, 3))


KINDS: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (
    noise,
    gradient,
    stripes,
    pixel_noise,
    blobs,
    checkerboard,
    noise,
    flat,
)
