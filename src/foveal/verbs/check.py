"""`foveal check`: what is wrong with a data set, before anything is trained on it."""

from __future__ import annotations

from typing import Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import (
    DEFAULT_BACKBONE,
    BackboneOption,
    DataArgument,
    DeviceOption,
    OfflineOption,
    SeedOption,
)


def check(
    data: DataArgument,
    *,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    seed: SeedOption = 0,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Find corrupt, duplicate, leaking, mislabelled-looking and rare: findings by kind.

    Example: foveal check sample:digits
    """
    from foveal.verbs._findings import find, out_of_fold_probabilities
    from foveal.verbs._prepare import prepare

    prepared = prepare(data, backbone, offline=offline, device=device, progress=progress)
    found = find(prepared, out_of_fold_probabilities(prepared, seed))
    return Result({"images": len(prepared.dataset), "classes": list(prepared.dataset.classes), "findings": found}, text)


def text(content: dict[str, Any]) -> str:
    lines = [f"{content['images']} images, {len(content['classes'])} classes: {', '.join(content['classes'])}"]
    for kind, items in content["findings"].items():
        lines.append(f"{kind.replace('_', ' ')}: {len(items)}")
        lines += [f"  {item['message']}" for item in items[:5]]
        lines += [f"  ... and {len(items) - 5} more (--json shows all)"] if len(items) > 5 else []
    return "\n".join(lines if content["findings"] else [*lines, "nothing found"])
