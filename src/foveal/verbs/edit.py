"""`foveal edit`: change a picture by saying what it should show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DeviceOption


def edit(
    image: Annotated[Path, "Image file."],
    *,
    to: Annotated[str, "What it should show: a text, or a class of the model."],
    from_: Annotated[str, "What it shows now, as far as it matters; default: nothing is said."] = "",
    model: Annotated[
        str, "Folder of a diffusion model (of foveal, or of diffusers' Stable Diffusion), or its name in the cache."
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    method: Annotated[str, "NAME or NAME:key=value,... of a generate method."] = "diffedit",
    mask: Annotated[Path | None, "Picture that is white where the edit may go; default: the method finds out."] = None,
    out: Annotated[Path | None, "Folder of the edit; default runs/IMAGE-edit."] = None,
    seed: Annotated[int, "Rules the noise."] = 0,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Edit a picture by text, with a mask that you can look at and override.

    Writes into --out edited.png, mask.png, original.png, index.html (side by side) and edit.json. Nothing is
    downloaded: without a diffusion model on this machine the message says how to get one.

    Example: foveal edit three.png --to 8 --from 3 --model glyphs --out eight
    """
    from foveal.verbs._edited import edit_image

    folder = Path(out or Path("runs") / f"{Path(image).stem}-edit")
    record = edit_image(
        image, to, from_, model=model, method=method, mask=mask, out=folder, seed=seed, device=device,
        progress=progress or Progress(),
    )  # fmt: skip
    return Result(record, text)


def text(content: dict[str, Any]) -> str:
    lines = [
        f"{100 * content['share']:.1f}% of the picture was open to the edit, {100 * content['changed']:.1f}% changed"
    ]
    return "\n".join([*content["notes"], *lines, f"{content['folder']}/index.html"])
