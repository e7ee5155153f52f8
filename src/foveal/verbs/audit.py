"""`foveal audit`: how easily a Bundle is fooled, or what is inside of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DataArgument, DeviceOption, OfflineOption, SeedOption


def audit(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    data: DataArgument,
    *,
    method: Annotated[str, "NAME or NAME:key=value,... of a robust method."] = "advencoder",
    out: Annotated[Path | None, "Folder of the page; default runs/BUNDLE-audit."] = None,
    images: Annotated[
        int, "Images an attack learns from, and as many others to measure on; or images to look at."
    ] = 200,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Attack a Bundle, and measure whether the attack does more than noise of its size; then ordinary damage.

    The attack learns from images of DATA without their labels, and is measured on others. Writes into --out
    index.html, audit.json, the change that was learnt (perturbation.safetensors) and pictures of what it does.

    A method that examines instead (filter-design) looks inside the network, with images of DATA that need no labels,
    and writes the same page, numbers and pictures of what it found.

    Example: foveal audit runs/digits sample:digits --method advencoder:epochs=2 --images 16 --out audit
    """
    from functools import partial

    from foveal.verbs._audited import audited, chosen
    from foveal.verbs._examined import examined

    default = Path("runs") / f"{Path(bundle).resolve().name}-audit"
    judge = chosen(method)
    content = (partial(examined, judge) if judge.examines() else audited)(
        bundle, data, method, out=Path(out or default), images=images, seed=seed,
        offline=offline, device=device, progress=progress or Progress(),
    )  # fmt: skip
    return Result(content, text)


def text(content: dict[str, Any]) -> str:
    from foveal.evaluate.audited import KINDS, size

    if "examined" in content:
        return "\n".join([content["verdict"], *content["findings"], f"{content['folder']}/index.html"])
    clean = content["found"]["clean"]
    lines = [f"{content['found']['n']} images ({content['measured']}): accuracy {clean['accuracy']:.1%}"]
    for row in content["found"]["sizes"]:
        altered = ", ".join(f"{kind} {row[kind]['fooled']:.1%}" for kind in KINDS)
        lines.append(f"{size(row)}: answers altered by {altered}; accuracy {row['attack']['accuracy']:.1%}")
    return "\n".join([*lines, content["verdict"], f"{content['folder']}/index.html"])
