"""Images with points for the loop: each is turned, scaled, mirrored and recoloured, and its points go with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from foveal.backbones.adapter import normalise
from foveal.core.errors import UsageError
from foveal.core.preprocessing import Preprocessing
from foveal.data.geometry import Carry, about_centre, letterbox, moved
from foveal.data.points import Points
from foveal.train.feed import Feed


@dataclass(frozen=True)
class Amount:
    """How far an image may be moved and recoloured: degrees, scales, shares of the side, and shares of brightness."""

    angle: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    occlude: float = 0.0


AMOUNTS = {
    "none": Amount(),
    "light": Amount(15, (0.85, 1.2), 0.05, 0.2),
    "strong": Amount(40, (0.7, 1.35), 0.1, 0.5, 0.3, 0.5),
}


class LandmarkFeed(Feed):
    """Training images of `Points`, each one whole in a square of the backbone's size.

    Args:
        points: what to learn from.
        augment: 'none', 'light' or 'strong'.
        flip: 'auto' (mirror where `points.flip` says the twins), 'on' or 'off'.
        views: 2 adds a moved copy of each image (moved lightly at least), and how it was moved; see `Dense.loss`.

    Raises:
        UsageError: flip is 'on' and nothing says which points are twins.
    """

    def __init__(
        self,
        points: Points,
        preprocessing: Preprocessing,
        *,
        augment: str = "light",
        flip: str = "auto",
        views: int = 1,
    ) -> None:
        if flip == "on" and points.flip is None:
            raise UsageError(
                "flip=on needs to know which points are mirror twins: add a column flip ('2 1 3'), or give the points "
                "names that say left and right"
            )
        self.points, self.preprocessing, self.views = points, preprocessing, views
        self.augment, self.flip = augment, points.flip if flip != "off" else None

    def __len__(self) -> int:
        return len(self.points)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = self.points.images.image(index)
        xy, known = self.points.xy[index], self.points.known[index]
        side = self.preprocessing.size
        whole, straight = letterbox(image.size, side), np.arange(xy.shape[0])
        amount = AMOUNTS[self.augment]
        move, order = self.draw(amount, rng)
        if not within(moved(move @ whole, xy), side)[known].any():
            move, order = np.eye(3), straight
        first = self.view(image, move @ whole, xy[order], known[order], amount, rng)
        if self.views == 1:
            return first
        move, twins = self.draw(AMOUNTS["light"] if self.augment == "none" else amount, rng)
        both = order[twins]
        second = self.view(image, move @ first["matrix"], xy[both], known[both], amount, rng)
        return {
            **{key: first[key] for key in ("images", "points", "known")},
            "view": second["images"],
            "view_points": second["points"],
            "view_known": second["known"],
            "matrix": move.astype(np.float32),
            "order": np.argsort(twins),
        }

    def draw(self, amount: Amount, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A matrix in pixels of the square, and which old point each new one is."""
        side, count = self.preprocessing.size, len(self.points.names)
        mirror = self.flip is not None and amount.angle > 0 and rng.random() < 0.5
        shift = tuple(rng.uniform(-amount.shift, amount.shift, 2) * side)
        angle, scale = rng.uniform(-amount.angle, amount.angle), rng.uniform(*amount.scale)
        matrix = about_centre((side, side), angle=angle, scale=scale, shift=shift, mirror=mirror)  # type: ignore[arg-type]
        return matrix, np.array(self.flip) if mirror else np.arange(count)

    def view(
        self,
        image: Image.Image,
        matrix: np.ndarray,
        xy: np.ndarray,
        known: np.ndarray,
        amount: Amount,
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        side = self.preprocessing.size
        places = moved(matrix, xy)
        pixels = np.array(recoloured(Carry(matrix, (side, side))(image), amount, rng))
        if rng.random() < amount.occlude:
            height, width = (rng.uniform(0.1, 0.3, 2) * side).astype(int)
            top, left = (int(rng.integers(side - length + 1)) for length in (height, width))
            pixels[top : top + height, left : left + width] = rng.integers(256, size=3)
        return {
            "images": pixels,
            "points": places.astype(np.float32),
            "known": (known & within(places, side)).astype(np.float32),
            "matrix": matrix,
        }

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = {name: normalise(batch[name], self.preprocessing) for name in ("images", "view") if name in batch}
        return {**batch, **images}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(
            repr((self.points.images.ids, self.preprocessing, self.augment, self.flip, self.views)).encode()
        )
        digest.update(self.points.xy.tobytes() + self.points.known.tobytes())
        return digest.hexdigest()


def within(places: np.ndarray, side: int) -> np.ndarray:
    """Whether points [K, 2] lie on a square of `side` pixels."""
    return np.all((places >= -0.5) & (places <= side - 0.5), axis=-1)


def recoloured(image: Any, amount: Amount, rng: np.random.Generator) -> Any:
    low, high = 1 - amount.colour, 1 + amount.colour
    brightness, contrast, saturation, blurred, width = rng.uniform(size=5)
    if amount.colour:
        image = v2.functional.adjust_brightness(image, low + (high - low) * brightness)
        image = v2.functional.adjust_contrast(image, low + (high - low) * contrast)
        image = v2.functional.adjust_saturation(image, low + (high - low) * saturation)
    if blurred < amount.blur:
        image = v2.functional.gaussian_blur(image, [5, 5], [0.3 + 1.2 * width])
    return image
