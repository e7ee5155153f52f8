"""`foveal predict`: answers for new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DeviceOption


def predict(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    images: Annotated[list[Path], "Image files, or folders of images."],
    *,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Label images; what resembles no training image is answered `unknown`.

    Example: foveal predict runs/digits photo.png --json
    """
    from foveal.ship.bundle import load

    progress = progress or Progress()
    rows = load(bundle).predict(
        images, device=device, progress=lambda done, total: progress.update("predicting", done, total)
    )
    return Result(rows, text)


def text(rows: list[dict[str, Any]]) -> str:
    return "\n".join(line(row) for row in rows)


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['image']}  cannot be read: {row['error']}"
    answer = f"{row['label'] or '(no label)'}  {row['probability']:.3f}"
    return f"{row['image']}  {f'unknown (nearest: {answer})' if row['unknown'] else answer}"
