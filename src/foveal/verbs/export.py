"""`foveal export`: a Bundle's model as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from foveal.core.progress import Progress
from foveal.verbs._results import Result


def export(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    *,
    to: Annotated[str, "Format: onnx."] = "onnx",
    images: Annotated[Path | None, "Images to check parity on; default: the data the Bundle was fitted on."] = None,
    progress: Progress | None = None,
) -> Result:
    """Write model.onnx into the Bundle: uint8 images in, calibrated probabilities out, parity checked.

    Example: foveal export runs/digits --to onnx
    """
    from foveal.core.errors import UsageError
    from foveal.verbs._export import export_bundle

    if to != "onnx":
        raise UsageError(f"--to {to}: expected onnx")
    record = export_bundle(bundle, images, progress or Progress())
    return Result(
        record,
        lambda made: (
            f"{made['path']}: largest difference of a probability from torch "
            f"{made['max_abs_difference']:.1e} over {made['images']} images"
        ),
    )
