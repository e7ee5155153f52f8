"""`foveal explain`: where in each image an answer comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DeviceOption


def explain(
    bundle: Annotated[Path, "Bundle folder made by `foveal fit`."],
    images: Annotated[list[Path], "Image files, or folders of images."],
    *,
    method: Annotated[str, "NAME or NAME:key=value,... of an explain method."] = (
        "sobol-attribution:index=effect,grid=6,points=8"
    ),
    out: Annotated[Path | None, "Folder of the maps; default runs/BUNDLE-METHOD."] = None,
    target: Annotated[str | None, "Class to explain; default: the most probable one of each image."] = None,
    score: Annotated[bool, "Measure each map by deletion and insertion, beside maps that know nothing."] = True,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Draw which parts of each image an answer comes from, and measure whether the drawing can be trusted.

    Writes into --out, for each image, NAME.png (the map over the image) and NAME.npy (float32, height x width of the
    image), and for all of them index.html and explanations.json.

    Example: foveal explain runs/digits photo.png --method eigen-cam --out maps
    """
    from foveal.core.options import split_choice
    from foveal.ship.bundle import load_classifier
    from foveal.ship.explain import explain_images
    from foveal.verbs._explained import write_folder

    progress = progress or Progress()
    folder = Path(out or Path("runs") / f"{Path(bundle).resolve().name}-{split_choice(method)[0]}")
    found = explain_images(
        load_classifier(bundle),
        images,
        method,
        target=target,
        score=score,
        device=device,
        progress=lambda done, total: progress.update("explaining", done, total),
    )
    return Result(write_folder(folder, found, bundle=str(bundle), method=method), text)


def text(content: dict[str, Any]) -> str:
    lines = [line(row) for row in content["images"]]
    return "\n".join([*lines, f"{content['folder']}/index.html"])


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['image']}  cannot be read: {row['error']}"
    said = f"{row['image']}  {row['target']} {row['target_probability']:.3f}{' (unknown)' if row['unknown'] else ''}"
    if row["scores"]:
        ours, random = row["scores"]["map"], row["scores"]["random"]
        said += f"  deletion {ours['deletion']:.3f} (random {random['deletion']:.3f})"
        said += f"  insertion {ours['insertion']:.3f} (random {random['insertion']:.3f})"
    return said + f"  {row['map']}"
