"""`foveal shrink`: a Bundle in, one that costs less out, and what that lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DeviceOption, OfflineOption


def shrink(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    *,
    method: Annotated[str, "NAME or NAME:key=value,... of a shrink or accelerate method; several are joined by +."],
    target: Annotated[str | None, "What may be left of the cost: params=, macs=, latency= or size= a share."] = None,
    max_drop: Annotated[float, "Balanced accuracy that may be lost, 0 to 1; the report judges by it."] = 0.01,
    data: Annotated[
        str | None, "Labelled images to tune and judge on; default: the data the Bundle was fitted on."
    ] = None,
    out: Annotated[Path | None, "Folder of the new Bundle; default runs/BUNDLE-METHOD."] = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Make a Bundle's model smaller or faster, and measure before and after side by side on test images.

    The new Bundle works with every other verb. Its report says what was lost and what was gained: parameters,
    multiply-accumulates, file size, milliseconds in ONNX Runtime timed in turns, accuracy.

    Example: foveal shrink runs/digits --method powerquant:bits=4 --out runs/digits-4bit
    """
    from foveal.core.errors import UsageError
    from foveal.verbs._prepare import check_choices
    from foveal.verbs._shrunk import choose_chain, parse_target, shrink_bundle

    if not 0 <= max_drop <= 1:
        raise UsageError(f"--max-drop {max_drop}: expected a number from 0 to 1")
    check_choices(device=device)
    chain = choose_chain(method)
    default = Path("runs") / f"{Path(bundle).resolve().name}-{'-'.join(each.name for each in chain)}"
    folder = Path(out or default)
    record = shrink_bundle(
        bundle,
        chain,
        parse_target(target, chain),
        folder,
        request={"bundle": str(bundle), "method": method, "target": target, "data": data, "max_drop": max_drop},
        data=data,
        max_drop=max_drop,
        offline=offline,
        device=device,
        progress=progress or Progress(),
    )
    return Result({"bundle": str(folder), **record}, text)


def text(made: dict[str, Any]) -> str:
    from foveal.evaluate.beside import sides
    from foveal.verbs._results import table

    notes = [
        f"{step['name']}: " + ", ".join(f"{key} {value}" for key, value in step["notes"].items())
        for step in made["steps"]
        if step["notes"]
    ]
    columns, rows = sides(made)
    return "\n".join(
        [
            *notes,
            table([dict(zip(columns, row, strict=True)) for row in rows], columns),
            made["verdict"],
            f"{made['bundle']}/report.html",
        ]
    )
