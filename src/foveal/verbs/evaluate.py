"""`foveal evaluate`: a Bundle measured on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DataArgument, DeviceOption, OfflineOption


def evaluate(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name."],
    data: DataArgument,
    *,
    split: Annotated[str, "Measure only this split of data that have splits: train, val, test or all."] = "all",
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Measure a Bundle on labelled images: every metric with its 95% bootstrap interval.

    Example: foveal evaluate runs/digits sample:digits
    """
    import numpy as np

    from foveal.core.errors import DataError, UsageError
    from foveal.data.open import open_dataset
    from foveal.evaluate.metrics import measure
    from foveal.ship.bundle import load_classifier
    from foveal.verbs._known import check_knows

    progress = progress or Progress()
    model = load_classifier(bundle, offline=offline)
    dataset = open_dataset(data, offline=offline)
    if split not in ("all", "train", "val", "test"):
        raise UsageError(f"--split {split}: expected all, train, val or test")
    if split != "all":
        if dataset.splits is None:
            raise UsageError(f"--split {split}: {dataset.name} has no splits of its own; leave --split out")
        dataset = dataset.subset(np.flatnonzero(dataset.splits == split))
        if len(dataset) == 0:
            raise UsageError(f"--split {split}: {dataset.name} has no image in it")
    check_knows(model, dataset)
    probabilities, scores, errors = model.infer(
        dataset, device=device, progress=lambda done, total: progress.update("predicting", done, total)
    )
    kept = np.setdiff1d(np.arange(len(dataset)), list(errors))
    if len(kept) == 0:
        raise DataError(f"none of the {len(dataset)} images of {dataset.name} can be decoded")
    metrics = measure(probabilities[kept], model.labels_of(dataset, kept), model.classes, model.task)
    metrics["unknown_rate"] = float((scores[kept] > model.threshold).mean())
    metrics["set_aside"] = [[dataset.ids[row], errors[row]] for row in sorted(errors)] + [
        list(item) for item in dataset.set_aside
    ]
    return Result(metrics, text)


def text(metrics: dict[str, Any]) -> str:
    from foveal.ship.bundle import headline

    lines = [f"{metrics['n']} images: {headline(metrics)}", f"answered unknown: {metrics['unknown_rate']:.1%}"]
    if metrics["set_aside"]:
        lines.append(f"set aside: {len(metrics['set_aside'])} (first: {': '.join(metrics['set_aside'][0])})")
    return "\n".join(lines)
