"""`foveal curate`: a pool of images in, the part of it worth keeping out, with a reason for every image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DEFAULT_BACKBONE, BackboneOption, DeviceOption, OfflineOption, default_out


def curate(
    data: Annotated[
        str,
        "Images, labelled or not: a folder, CSV or Parquet (image[,label][,split]), WebDataset .tar or brace pattern, "
        "hub:owner/name or sample:NAME.",
    ],
    *,
    method: Annotated[str, "NAME or NAME:key=value,... of a curate method."] = "less-is-more",
    keep: Annotated[float | None, "Share of the images to keep at most; default: as the method's options say."] = None,
    groups: Annotated[
        str | None,
        "Reduce each group by itself: a number of folder levels (1: the first folder; -1: the one the image is in), "
        "label, or a column of the table.",
    ] = None,
    out: Annotated[Path | None, "Parquet file to write; default runs/DATA-METHOD.parquet."] = None,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Drop what a pool of images repeats: a manifest that any verb reads as DATA, and a page to look at.

    The manifest names every image, kept or not, the one that stands for it and why. Images of the splits val and test
    stay untouched. Beside it lies a page of the same name with the reduction curve and the fullest clusters.

    Example: foveal curate sample:digits --keep 0.5 --out subset.parquet
    """
    from foveal.core import catalogue
    from foveal.core.errors import UsageError
    from foveal.core.families.curate import Curate
    from foveal.data.selection import check_free
    from foveal.verbs._curated import choose, open_images_of, write
    from foveal.verbs._prepare import check_choices

    progress = progress or Progress()
    check_choices(device=device)
    chosen = catalogue.create(method)
    if not isinstance(chosen, Curate):
        able = ", ".join(catalogue.names("curate"))
        raise UsageError(f"{chosen.name} is a method to {chosen.spec.family}, not to curate: expected one of {able}")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep {keep:g}: expected a share above 0 and at most 1")
    out = Path(out) if out else default_out(data, chosen.name).with_suffix(".parquet")
    check_free(out)
    if not out.exists() and out.with_suffix(".html").exists():
        raise UsageError(f"{out.with_suffix('.html')} is in the way of the page of {out}: choose another --out")
    pool = open_images_of(data, groups, chosen, backbone=backbone, offline=offline, device=device, progress=progress)
    selection = choose(chosen, pool, keep)
    content = write(out, data, pool, selection, method=chosen, keep=keep)
    for note in content["notes"]:
        progress.say(note)
    return Result(content, text)


def text(content: dict[str, Any]) -> str:
    from foveal.evaluate.curated import AUDIT

    n, kept = content["images"], content["kept"]
    chosen = ", ".join(f"{name} {value}" for name, value in content["chosen"].items())
    lines = [f"{kept:,} of {n:,} images kept ({kept / n:.1%}){f', {chosen}' if chosen else ''}"]
    if content["untouched"]:
        lines[0] += f"; {content['untouched']:,} of val and test are left as they were"
    lines += [f"{AUDIT.get(name, name.replace('_', ' '))}: {value:,.0f}" for name, value in content["audit"].items()]
    return "\n".join([*lines, content["manifest"], content["page"]])
