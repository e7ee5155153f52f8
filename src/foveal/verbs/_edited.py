"""An edit -> a folder: the picture before and after, the mask, one page and one JSON document."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveal.backbones.painter import load_painter
from foveal.core import catalogue
from foveal.core.bundle import atomic_folder, read_json, write_json
from foveal.core.errors import DataError, UsageError
from foveal.core.families.generate import Generate
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.data.dataset import read_file
from foveal.data.images import decode
from foveal.evaluate.edited import write_edited
from foveal.features.session import pick_device

RECORD = "edit.json"
CHANGED = 2 / 255


def edit_image(
    image: Path, to: str, source: str, *, model: str, method: str, mask: Path | None, out: Path, seed: int, device: str,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Edit one image and write the folder; returns what edit.json holds.

    Raises:
        UsageError: both texts are empty, a mask of another size, --out holds something else, or a size or class that
            the model does not know.
        DataError: the image or the mask cannot be read.
        BackboneError: no such diffusion model, or one that cannot be used.
    """
    start = time.perf_counter()
    chosen = catalogue.create(method)
    if not isinstance(chosen, Generate):
        raise UsageError(f"{chosen.name} edits no images: expected one of {', '.join(catalogue.names('generate'))}")
    if not (to.strip() or source.strip()):
        raise UsageError("--to and --from are both empty: say what the picture should show")
    check_free(out)
    photo = read_picture(image)
    drawn = None if mask is None else read_picture(mask).convert("L")
    if drawn is not None and drawn.size != photo.size:
        sizes = [f"{width} x {height}" for width, height in (drawn.size, photo.size)]
        raise UsageError(f"the mask has {sizes[0]} pixels, the image {sizes[1]}: draw it over the image")
    painter = load_painter(model)
    target = pick_device(device)
    painter.to(target)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float().to(target) / 255
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        x = painter.encode(pixels)
        conditions = [painter.condition(text.strip()).to(target) for text in (to, source)]
        given = None if drawn is None else cells(drawn, x).to(target)
        progress.update("editing", 0, 1)
        made = chosen.edit(painter, x, conditions[0], conditions[1], mask=given, seed=seed)
        edited = painter.decode(made.x)
        progress.update("editing", 1, 1)
    notes += [str(each.message) for each in caught if "mask is empty" in str(each.message)]
    before, after = picture(pixels), picture(edited)
    if not made.mask.any():
        after = before
    where = F.interpolate(made.mask.float(), pixels.shape[-2:], mode="nearest")[0, 0].cpu().numpy() > 0
    apart = np.abs(np.asarray(before, np.float32) - np.asarray(after, np.float32)).max(-1) / 255
    record: dict[str, Any] = {
        "folder": str(out),
        "image": str(image),
        "to": to,
        "source": source,
        "model": model,
        "method": {"name": chosen.name, "options": options_to_dict(chosen.options)},
        "mask": "given" if mask else "found",
        "share": float(made.mask.float().mean()),
        "changed": float((apart > CHANGED).mean()),
        "changed_outside": float((apart > CHANGED)[~where].mean()) if not where.all() else 0.0,
        "evaluations": chosen.evaluations(mask is not None) if made.mask.any() else None,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 2),
        "notes": notes,
    }
    shown = Image.fromarray((255 * where).astype(np.uint8))
    with atomic_folder(out) as folder:
        for name, each in (("original", before), ("edited", after), ("mask", shown)):
            each.save(folder / f"{name}.png")
        write_json(folder / RECORD, record)
        write_edited(folder / "index.html", record, before, shown, after)
    return record


def read_picture(path: Path) -> Image.Image:
    try:
        return decode(read_file(str(path)))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def check_free(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_json(folder / RECORD)["to"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--out {folder} exists and holds no edit: choose another --out") from None


def cells(drawn: Image.Image, x: Tensor) -> Tensor:
    """A mask in grey -> the cells of `x` [1, C, h, w] of which at least half is white, bool [1, 1, h, w]."""
    grey = torch.from_numpy(np.array(drawn, np.float32))[None, None] / 255
    return F.adaptive_avg_pool2d(grey, (x.shape[-2], x.shape[-1])) >= 0.5


def picture(image: Tensor) -> Image.Image:
    """[1, 3, H, W] in 0..1 -> a picture."""
    return Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).cpu().numpy())
