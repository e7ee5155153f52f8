"""`foveal update`: a Bundle learns new classes, and keeps the old."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from foveal.core.progress import Progress
from foveal.verbs.fit import DataArgument, DeviceOption, OfflineOption, SeedOption

if TYPE_CHECKING:
    from foveal.ship.bundle import Bundle


def update(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit` or `foveal update`, or hub:owner/name."],
    data: DataArgument,
    *,
    method: Annotated[str, "NAME or NAME:key=value,... of a continual method."] = "dytox",
    memory: Annotated[int, "Images of every class, at most, that the new Bundle keeps to learn more by."] = 20,
    old: Annotated[
        str | None, "Images of the old classes; default: what the Bundle keeps of them, or the data it was fitted on."
    ] = None,
    out: Annotated[Path | None, "Folder of the new Bundle; default runs/BUNDLE-updated."] = None,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Bundle:
    """Add the classes of DATA to a Bundle: one that answers old and new ones alike, without being told which it is.

    DATA holds the new classes only. The report shows by how much the answers to old images moved; by default the
    scores of the old classes do not move at all. The new Bundle keeps some images of every class, so that it can be
    updated again without the data it came from.

    Example: foveal update runs/digits new/ --memory 20 --out runs/more-digits
    """
    from foveal.verbs._updated import update_bundle

    default = Path("runs") / f"{Path(bundle).resolve().name}-updated"
    return update_bundle(
        bundle, data, method, Path(out or default), memory=memory, old=old,
        seed=seed, offline=offline, device=device, progress=progress or Progress(),
    )  # fmt: skip
