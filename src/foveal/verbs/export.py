"""`foveal export`: a Bundle's model as one ONNX file, and in 8 bits where that is faster and as good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result


def export(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    *,
    to: Annotated[str, "Format: onnx."] = "onnx",
    images: Annotated[Path | None, "Images or clips to check parity on; default: what it was fitted on."] = None,
    int8: Annotated[bool, "Try int8 and, with OpenVINO, bf16; keep the fastest within --max-drop."] = False,
    max_drop: Annotated[float, "Balanced accuracy that a faster variant may lose, 0 to 1."] = 0.01,
    require: Annotated[bool, "With --int8: an error when no int8 variant is accepted."] = False,
    data: Annotated[
        str | None, "Labelled images for --int8; default: the data the Bundle was fitted on, by its own split."
    ] = None,
    progress: Progress | None = None,
) -> Result:
    """Write model.onnx into the Bundle: uint8 images in, calibrated probabilities out, parity checked.

    Of a classifier of clips it takes clips, of landmarks squares; of an image-text Bundle it gives unit vectors, and
    text.onnx beside it those of texts.

    With --int8 also model.int8.onnx, calibrated on training images, if it is faster than model.onnx in the same run
    and loses at most --max-drop on test images.

    Example: foveal export runs/digits --to onnx
    """
    from foveal.core.errors import UsageError
    from foveal.verbs._export import export_bundle, shrink_export

    if to != "onnx":
        raise UsageError(f"--to {to}: expected onnx")
    if not 0 <= max_drop <= 1:
        raise UsageError(f"--max-drop {max_drop}: expected a number from 0 to 1")
    if not int8 and (require or data):
        raise UsageError(f"{'--require' if require else '--data'} belongs to --int8: add --int8, or leave it out")
    progress = progress or Progress()
    record = export_bundle(bundle, images, progress, int8)
    if int8:
        record |= shrink_export(Path(record["path"]).parent, data, max_drop, require, progress)
    return Result(record, text)


def text(made: dict[str, Any]) -> str:
    from foveal.verbs._results import table

    parity = (
        f"{made['path']}: largest difference of {made.get('compared', 'a probability')} from torch "
        f"{made['max_abs_difference']:.1e} over {made['images']} {made.get('checked', 'images')}"
    )
    if "variants" not in made:
        return parity
    columns = ["name", "milliseconds", "speedup", "balanced_accuracy", "drop", "accepted"]
    reasons = [f"{row['name']}: {row['reason']}" for row in made["variants"] if not row["accepted"]]
    return "\n".join(
        [
            parity,
            f"judged on {made['judged_on']}; int8 calibrated on {made['calibrated_on']}",
            table(made["variants"], columns),
            *reasons,
            f"chosen: {made['chosen']}",
        ]
    )
