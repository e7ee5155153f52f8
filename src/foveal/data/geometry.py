"""An image, its mask, boxes and points, carried together through one affine map; one convention of pixel centres.

Points: the centre of the pixel in column i and row j is (i, j), so an image of W columns spans x from -0.5 to W - 0.5.
Boxes are torchvision's and hold edges, from 0 to W: the edge e lies at the point coordinate e - 0.5. Matrices [3, 3]
take points (x, y, 1) from old to new. Resizing therefore takes x to (x + 0.5) * new / old - 0.5, as images are resized
by Pillow and by torch (`align_corners=False`); torchvision's own resize of KeyPoints leaves the half pixel out, and is
not used here.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from foveal.core.errors import UsageError

P = TypeVar("P", np.ndarray, Tensor)


def resizing(old: tuple[float, float], new: tuple[float, float]) -> np.ndarray:
    """Matrix of a resize from `old` to `new` (width, height)."""
    x, y = new[0] / old[0], new[1] / old[1]
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def letterbox(size: tuple[int, int], side: int) -> np.ndarray:
    """Matrix that fits an image of `size` (width, height) whole into the middle of a square, its shape kept."""
    scale = side / max(size)
    x, y = (side - 1) / 2 - scale * (size[0] - 1) / 2, (side - 1) / 2 - scale * (size[1] - 1) / 2
    return np.array([[scale, 0, x], [0, scale, y], [0, 0, 1]])


def about_centre(
    size: tuple[int, int],
    *,
    angle: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    mirror: bool = False,
) -> np.ndarray:
    """Matrix that mirrors left and right, turns clockwise by `angle` degrees and scales about the centre of an image
    of `size` (width, height), then shifts by pixels."""
    cx, cy = (size[0] - 1) / 2, (size[1] - 1) / 2
    c, s = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle))
    linear = np.array([[c, -s], [s, c]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = np.array([cx, cy]) + shift - linear @ [cx, cy]
    return matrix


def moved(matrix: P, points: P) -> P:
    """Points [..., K, 2] through matrices [..., 3, 3]."""
    return points @ matrix[..., :2, :2].mT + matrix[..., None, :2, 2]


def moved_boxes(matrix: P, boxes: P) -> P:
    """The upright boxes around boxes [..., 4] (left, top, right, bottom edges) moved by one matrix."""
    corners = boxes[..., [[0, 1], [2, 1], [2, 3], [0, 3]]] - 0.5
    at = moved(matrix, corners) + 0.5
    if isinstance(at, Tensor):
        return torch.cat([at.amin(-2), at.amax(-2)], -1)
    return np.concatenate([at.min(-2), at.max(-2)], -1)


def resample(
    images: Tensor, matrices: Tensor, size: tuple[int, int], *, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], float, through matrices [B, 3, 3] onto a canvas of `size` (width, height); bilinear.

    Returns:
        The moved images [B, C, height, width], 0 where nothing lands, and where something does, bool
        [B, 1, height, width]: the centre of the pixel comes from between the centres of the outermost old ones.
    """
    width, height = size
    H, W = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], -1).reshape(1, -1, 2).to(images.device, torch.float64)
    source = moved(torch.linalg.inv(matrices.double()), places)
    extent = torch.tensor([W, H], device=images.device, dtype=torch.float64)
    slack = 1e-6
    inside = ((source > -slack) & (source < extent - 1 + slack)).all(-1)
    grid = ((2 * source + 1) / extent - 1).to(images).unflatten(1, (height, width))
    mode = "nearest" if nearest else "bilinear"
    found = F.grid_sample(images, grid, mode, "zeros", align_corners=False)
    return found, inside.unflatten(1, (height, width))[:, None]


def resample_image(image: Tensor, matrix: np.ndarray, size: tuple[int, int]) -> Tensor:
    """One image [C, H, W] of any dtype; what shrinks is averaged first, so that fine patterns do not alias."""
    scale = math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    if scale < 1:
        old = image.shape[-1], image.shape[-2]
        new = max(1, round(old[0] * scale)), max(1, round(old[1] * scale))
        image = v2.functional.resize(image, [new[1], new[0]], antialias=True)
        matrix = matrix @ np.linalg.inv(resizing(old, new))
    found, _ = resample(image[None].float(), torch.from_numpy(matrix)[None], size)
    return found[0] if image.is_floating_point() else found[0].round().to(image.dtype)


class Carry(v2.Transform):
    """A torchvision v2 transform: any nest of dicts, lists and tuples in, the same out, with everything that has a
    place in the image moved by one matrix. Images are bilinear, masks take the nearest old pixel; outside is 0.

    Args:
        matrix: [3, 3], points of the old image to points of the new.
        size: width and height of the new image.

    Raises:
        UsageError: a matrix that is not affine or cannot be turned back.
    """

    _transformed_types = (
        Image.Image,
        tv_tensors.Image,
        tv_tensors.Mask,
        tv_tensors.BoundingBoxes,
        tv_tensors.KeyPoints,
    )

    def __init__(self, matrix: np.ndarray, size: tuple[int, int]) -> None:
        super().__init__()
        self.matrix, self.size = np.asarray(matrix, np.float64), size
        regular = self.matrix.shape == (3, 3) and np.isfinite(self.matrix).all()
        if not regular or (self.matrix[2] != [0, 0, 1]).any() or abs(np.linalg.det(self.matrix)) < 1e-9:
            raise UsageError(f"{self.matrix.tolist()} is no affine matrix that can be turned back: expected [3, 3]")

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        canvas = (self.size[1], self.size[0])
        if isinstance(inpt, Image.Image):
            pixels = resample_image(v2.functional.pil_to_tensor(inpt), self.matrix, self.size)
            return v2.functional.to_pil_image(pixels)
        matrix = torch.from_numpy(self.matrix)
        plain = inpt.as_subclass(Tensor)
        if isinstance(inpt, tv_tensors.Image):
            return rewrapped(resample_image(plain, self.matrix, self.size), like=inpt)
        if isinstance(inpt, tv_tensors.Mask):
            flat = plain.reshape(1, -1, *plain.shape[-2:]).double()
            found, _ = resample(flat, matrix[None], self.size, nearest=True)
            return rewrapped(found.reshape(*plain.shape[:-2], *canvas).to(plain.dtype), like=inpt)
        if isinstance(inpt, tv_tensors.KeyPoints):
            new = moved(matrix.to(plain.device), plain.double()).to(as_float(plain))
            return rewrapped(new, like=inpt, canvas_size=canvas)
        edges = v2.functional.convert_bounding_box_format(plain, inpt.format, tv_tensors.BoundingBoxFormat.XYXY)
        new = moved_boxes(matrix.to(plain.device), edges.double()).to(as_float(plain))
        back = v2.functional.convert_bounding_box_format(new, tv_tensors.BoundingBoxFormat.XYXY, inpt.format)
        return rewrapped(back, like=inpt, canvas_size=canvas)


def rewrapped(values: Tensor, like: Any, **canvas: Any) -> Any:
    """Values as the kind of tv_tensor that `like` is."""
    return cast(Any, tv_tensors.wrap)(values, like=like, **canvas)


def fitted(image: Image.Image, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo whole in the middle of a square: pixels uint8 [side, side, 3], and the matrix that took it there."""
    matrix = letterbox(image.size, side)
    return np.asarray(Carry(matrix, (side, side))(image)), matrix


def as_float(values: Tensor) -> torch.dtype:
    """Places between pixels need fractions: whole numbers become float32."""
    return values.dtype if values.is_floating_point() else torch.float32
