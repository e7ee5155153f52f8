"""Seeded procedural images and clips. `garbage` makes pictures that no user's photo looks like, to choose an unknown
score by; `arrow_of_motion` clips whose frames are the same forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def arrow_of_motion(
    photos: Sequence[np.ndarray],
    count: int,
    size: int,
    frames: int,
    seed: int,
    band: tuple[float, float] = (0, 1),
) -> tuple[np.ndarray, np.ndarray]:
    """A square of one photo slides to the right or to the left over a faded, still piece of another.

    Clip 2 i + 1 is clip 2 i played backwards: whoever sees single frames, or all of them without their order, is right
    about the direction of exactly half of the clips.

    Args:
        photos: two or more, uint8 [H, W, 3], which take turns; within the band at least `size` high and wide.
        count: of clips; even.
        band: from which to which share of their height photos are shown. Clips of bands that do not overlap share no
            pixel.

    Returns:
        Clips uint8 [count, frames, size, size, 3], and labels int64 [count, 2]: the direction (0: to the right) and the
        photo that slides.
    """
    clips = np.empty((count, frames, size, size, 3), np.uint8)
    labels = np.empty((count, 2), np.int64)
    side = 3 * size // 8
    for index in range(count // 2):
        rng = generator(seed, "arrow", *band, index)
        which = index % len(photos)
        other = (which + int(rng.integers(1, len(photos)))) % len(photos)
        square, ground = (piece(photos[number], length, band, rng) for number, length in ((which, side), (other, size)))
        ground = np.round(128 + 0.3 * (ground.astype(np.float64) - 128)).astype(np.uint8)
        way = (size - side) * rng.uniform(0.7, 1.0)
        start, top = rng.uniform(0, size - side - way), int(rng.integers(size - side + 1))
        lefts = np.round(start + way * np.arange(frames) / max(1, frames - 1)).astype(int)
        clip = np.repeat(ground[None], frames, 0)
        for frame, left in zip(clip, lefts, strict=True):
            frame[top : top + side, left : left + side] = square
        clips[2 * index], clips[2 * index + 1] = clip, clip[::-1]
        labels[2 * index], labels[2 * index + 1] = (0, which), (1, which)
    return clips, labels


def piece(photo: np.ndarray, side: int, band: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A square of `side` pixels from a photo, within a band of its height."""
    top, bottom = round(band[0] * len(photo)), round(band[1] * len(photo))
    y, x = int(rng.integers(top, bottom - side + 1)), int(rng.integers(photo.shape[1] - side + 1))
    return photo[y : y + side, x : x + side]


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
