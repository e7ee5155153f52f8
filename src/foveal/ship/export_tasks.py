"""Bundles that answer for clips, or with vectors, as ONNX: checked against torch on what they were fitted on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import normalise
from foveal.backbones.causal_text import BYTES
from foveal.backbones.towers import Towers
from foveal.core.errors import DataError, FovealError, UsageError
from foveal.core.folders import atomic_file
from foveal.core.preprocessing import Preprocessing
from foveal.data.clips import unfold, unlabelled_clips
from foveal.data.images import to_pixels
from foveal.data.open import open_images
from foveal.data.pairs import open_pairs
from foveal.evaluate.calibration import Calibrated
from foveal.features.clips import normalised
from foveal.features.graph import OPSET
from foveal.ship.export import TOLERANCE, reader, traced, write_behind_front
from foveal.ship.image_text import TOKENIZER, ImageTextBundle
from foveal.ship.video import VideoBundle

if TYPE_CHECKING:
    from PIL import Image

CHECKED = 8
"""Images or clips on which an exported model is compared with torch, at most."""
WORDS = "text.onnx"
SENTENCES = ("a", "a cat", "a photo of two dogs on a sofa", "three small houses beside a river, and behind them a hill")
"""What an exported language tower is compared with torch on."""
T = TypeVar("T")
OTHERWISE = "to check the exported model on, name others with --images"


class OfFrames(nn.Module):
    """A classifier of clips with its normalisation: squares uint8 [N T, 3, S, S] -> (probabilities, unknown score)."""

    def __init__(self, model: Calibrated, preprocessing: Preprocessing, frames: int) -> None:
        super().__init__()
        self.model, self.preprocessing, self.frames = model, preprocessing, frames

    def forward(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(unfold(normalise(squares.permute(0, 2, 3, 1), self.preprocessing), self.frames))


class Seeing(nn.Module):
    """An image tower with its normalisation: squares uint8 [N, 3, S, S] -> unit vectors [N, dim]."""

    def __init__(self, towers: Towers, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.towers, self.preprocessing = towers, preprocessing

    def forward(self, squares: Tensor) -> Tensor:
        return self.towers.encode_images(normalise(squares.permute(0, 2, 3, 1), self.preprocessing))


class Reading(nn.Module):
    """A language tower: ids int64 [N, L] and mask bool [N, L] -> unit vectors [N, dim]."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.towers.encode_texts(ids * mask, mask)  # a tower that reads no mask keeps it as an input


def export_clips(bundle: VideoBundle, path: Path, clips: Path | None = None) -> dict[str, Any]:
    """Write a classifier of clips as ONNX.

    The graph takes `clips`, uint8 RGB [N, T, H, W, 3] of any size: the T frames of each that `bundle.method.sample`
    chooses. It gives `probabilities` [N, C] and `unknown_score` [N]; classes, threshold, preprocessing and T (`frames`)
    are in its metadata.

    Args:
        clips: video files or folders of frames to compare on; default: those the Bundle was fitted on.

    Raises:
        UsageError: no clips that can be decoded.
        FovealError: the classifier cannot be expressed in ONNX, or differs by more than 1e-4 in probability.
    """
    model, preprocessing = bundle.model, bundle.preprocessing
    frames = int(cast(Any, model.classifier).frames)
    shown = clips_of(bundle, clips)
    about = {
        "classes": json.dumps(list(bundle.classes), ensure_ascii=False),
        "task": "video",
        "unknown_threshold": repr(float(bundle.calibration["unknown"]["threshold"])),
        "frames": str(frames),
    }
    module, names = OfFrames(model, preprocessing, frames), ["probabilities", "unknown_score"]
    write_behind_front(module, preprocessing, path, names, about, frames=frames)
    session, gaps = reader(path), list[float]()
    for pictures in shown:
        squares = np.stack([to_pixels(picture, preprocessing) for picture in pictures])
        with torch.inference_mode():
            expected = model(normalised(squares[None], preprocessing))[0].numpy()
        given = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        gaps.append(largest(session.run(["probabilities"], {"clips": given[None]})[0] - expected))
    return record(path, gaps, len(shown), "a probability", "clips")


def clips_of(bundle: VideoBundle, clips: Path | None) -> list[list[Image.Image]]:
    """The frames that are looked at of up to CHECKED clips whose frames are of one size."""
    source = bundle.manifest["data"]["source"] if clips is None else clips
    try:
        found = unlabelled_clips([source])
    except DataError as error:
        raise UsageError(f"{error}; {OTHERWISE}") from None

    def frames(row: int) -> list[Image.Image]:
        clip = found[row][1]
        pictures = clip.read(bundle.method.sample(clip.count(), 0.5).tolist())
        if len({picture.size for picture in pictures}) > 1:
            raise DataError("frames of several sizes")
        return pictures

    return some(frames, len(found), f"the clips of {source}")


def export_towers(bundle: ImageTextBundle, path: Path, images: Path | None = None) -> dict[str, Any]:
    """Write both towers of an image-text Bundle as ONNX.

    The file at `path` takes `image`, uint8 RGB [N, H, W, 3] of any size. text.onnx, in the Bundle's folder, takes `ids`
    int64 [N, L] and `mask` bool [N, L] as `bundle.model.text.tokens` makes them. Both give `vectors` [N, dim] of length
    1; `scale` of the metadata times their inner product is a logit, `tokenizer` says what makes ids.

    Args:
        images: to compare on; default: those the Bundle was fitted on.

    Raises:
        UsageError: no images that can be decoded.
        FovealError: a tower cannot be expressed in ONNX, or a number of its vectors differs by more than 1e-4.
    """
    towers, preprocessing = bundle.model.cpu(), bundle.preprocessing
    shown = images_of(bundle, images)
    about = {"task": "image-text", "dim": str(towers.dim), "scale": repr(float(towers.scale))}
    with atomic_file(bundle.path / WORDS) as words:
        tokenizer = TOKENIZER if bundle.manifest["text"]["tokenizer"] else BYTES
        write_words(towers, words, {**about, "tokenizer": tokenizer, "context": str(towers.text.context)})
        write_behind_front(Seeing(towers, preprocessing), preprocessing, path, ["vectors"], about)
        seen, heard = reader(path), reader(words)
        gaps: list[float] = []
        for image in shown:
            pixels = torch.from_numpy(to_pixels(image, preprocessing).copy())[None]
            with torch.inference_mode():
                expected = towers.encode_images(normalise(pixels, preprocessing)).numpy()
            gaps.append(largest(seen.run(None, {"image": np.asarray(image.convert("RGB"))[None]})[0] - expected))
        for count in range(1, len(SENTENCES) + 1):
            ids, mask = towers.text.tokens(SENTENCES[:count], truncate=True)
            with torch.inference_mode():
                expected = towers.encode_texts(ids, mask).numpy()
            gaps.append(largest(heard.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0] - expected))
        checked = f"images and {len(SENTENCES)} texts"
        made = record(path, gaps, len(shown), "a number of a unit vector", checked)
        return {**made, "text_bytes": words.stat().st_size}


def write_words(towers: Towers, path: Path, about: dict[str, str]) -> None:
    import onnx

    ids, mask = towers.text.tokens(SENTENCES[:2], truncate=True)
    dynamic = {"ids": {0: "N", 1: "L"}, "mask": {0: "N", 1: "L"}, "vectors": {0: "N"}}
    traced(Reading(towers), (ids, mask), path, ["ids", "mask"], ["vectors"], dynamic)
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, about)
    graph.producer_name = "foveal"
    onnx.save(graph, path)


def images_of(bundle: ImageTextBundle, images: Path | None) -> list[Image.Image]:
    """Up to CHECKED of them."""
    source = bundle.manifest["data"]["source"]
    try:
        found = open_pairs(source).images if images is None else open_images([images])
    except DataError as error:
        raise UsageError(f"{error}; {OTHERWISE}") from None
    return some(found.image, len(found), f"the images of {found.name}")


def some(read: Callable[[int], T], count: int, of: str) -> list[T]:
    """Up to CHECKED things that can be read, spread evenly.

    Raises:
        UsageError: none can.
    """
    found: list[T] = []
    for row in np.linspace(0, count - 1, min(2 * CHECKED, count)).astype(int).tolist():
        with suppress(DataError):
            found.append(read(row))
    if not found:
        raise UsageError(f"none of {of} can be decoded: {OTHERWISE}")
    return found[:CHECKED]


def largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())


def record(path: Path, gaps: Sequence[float], count: int, compared: str, checked: str) -> dict[str, Any]:
    """What cost.json says of an export.

    Raises:
        FovealError: it answers otherwise than torch.
    """
    if not max(gaps) <= TOLERANCE:
        raise FovealError(f"the exported model differs from torch by {max(gaps):.1e} in {compared}: it was not kept")
    return {
        "opset": OPSET,
        "bytes": path.stat().st_size,
        "engine": f"onnxruntime {version('onnxruntime')}",
        "images": count,
        "max_abs_difference": max(gaps),
        "compared": compared,
        "checked": checked,
    }
