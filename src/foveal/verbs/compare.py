"""`foveal compare`: several methods on the same images, splits, seeds and budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result, table
from foveal.verbs.fit import (
    DEFAULT_BACKBONE,
    BackboneOption,
    BudgetOption,
    DataArgument,
    DeviceOption,
    OfflineOption,
    SeedOption,
    WeightsOption,
)

if TYPE_CHECKING:
    import numpy as np

    from foveal.verbs._adapt import Adapted
    from foveal.verbs._prepare import Prepared


def compare(
    data: DataArgument,
    *,
    methods: Annotated[
        str, "NAME or NAME:key=value,..., separated by commas; frozen means all frozen-feature ones."
    ] = ("frozen"),
    seeds: Annotated[int, "How many seeds, counted up from --seed; each has its own split."] = 1,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    out: Annotated[Path | None, "Folder of the comparison; default runs/compare-DATA."] = None,
    seed: SeedOption = 0,
    budget: BudgetOption = None,
    class_weights: WeightsOption = "auto",
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Measure methods side by side on held-out images, beside two reference rows.

    A method that cannot work on the backbone is named and left out. Writes comparison.json, comparison.csv and
    comparison.html. Stopped or killed, the same command goes on.

    Example: foveal compare sample:digits --methods linear,gda-clip --seeds 2
    """
    import shutil
    import time

    from foveal.core.errors import BackboneError, UsageError
    from foveal.core.folders import claim
    from foveal.verbs._adapt import FrozenRows, adapt, check_suits, choose
    from foveal.verbs._compared import Ledger, check_out, write_tables
    from foveal.verbs._prepare import check_choices, parse_budget, prepare
    from foveal.verbs._race import frozen_methods
    from foveal.verbs._reference import reference_probabilities
    from foveal.verbs.fit import default_out

    progress = progress or Progress()
    check_choices(device=device, class_weights=class_weights)
    limit = parse_budget(budget)
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected 1 or more")
    choices = split_methods(methods)
    for choice in choices:
        if choice != "frozen":
            choose(choice)
    out = Path(out) if out else default_out(data, "compare")
    check_out(out)
    started = time.perf_counter()
    prepared = prepare(data, backbone, offline=offline, device=device, progress=progress)
    reading = time.perf_counter() - started
    names: list[str] = []
    for choice in choices:
        names += frozen_methods(prepared.dataset.task) if choice == "frozen" else [choice]
    chosen = {name: check_suits(choose(name), prepared) for name in dict.fromkeys(names)}

    request = {"data": str(data), "backbone": backbone, "class_weights": class_weights, "budget": budget}
    work = out.with_name(out.name + ".work")
    _held = claim(work)
    ledger = Ledger(work, request)
    refused: dict[str, BackboneError] = {}
    for run in range(seed, seed + seeds):
        wanted = [name for name in chosen if name not in refused and not ledger.has(name, run)]
        if not wanted and ledger.has("majority", run):
            continue
        splits = prepared.splits(run)
        frozen = any(chosen[name].reads_features() for name in wanted)
        rows = FrozenRows(prepared, splits, run, class_weights) if frozen else None
        for name in wanted:
            progress.say(f"seed {run}: {name}")
            work = ledger.folder / f"{name.replace(':', '-')}-{run}"
            try:
                adapted = adapt(
                    chosen[name], prepared, splits, rows, run, class_weights,
                    device=device, work=work, budget=limit, progress=progress,
                )  # fmt: skip
            except BackboneError as refusal:
                refused[name] = refusal
                progress.say(f"{name} is left out: {refusal}")
                continue
            ledger.add(row(name, run, adapted, prepared, device))
        labels = prepared.dataset.labels[splits == "test"]
        for name, probabilities in reference_probabilities(prepared, splits, run, class_weights).items():
            ledger.add(reference_row(name, run, probabilities, labels, prepared))
    measured = [name for name in chosen if name not in refused]
    if not measured:
        raise next(iter(refused.values()))
    table_rows = ledger.rows([*measured, "majority", "brightness"], range(seed, seed + seeds))
    content = {
        "data": prepared.dataset.name,
        "backbone": prepared.backbone.name,
        "images": len(prepared.dataset),
        "classes": list(prepared.dataset.classes),
        "reading_seconds": round(reading, 3),
        "rows": table_rows,
    }
    write_tables(out, content)
    shutil.rmtree(ledger.folder, ignore_errors=True)
    return Result(table_rows, lambda found: f"{text(found)}\n{out}/comparison.html")


def split_methods(text: str) -> list[str]:
    """`a,b:k=1,l=2,c` -> [`a`, `b:k=1,l=2`, `c`]: a part with `=` and no `:` belongs to the method before it.

    Raises:
        UsageError: no method is named.
    """
    from foveal.core.errors import UsageError

    choices: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if "=" in item and ":" not in item and choices:
            choices[-1] += f",{item}"
        else:
            choices.append(item)
    if not choices:
        raise UsageError("--methods is empty: name at least one method, or 'frozen'")
    return choices


def row(name: str, seed: int, adapted: Adapted, prepared: Prepared, device: str) -> dict[str, Any]:
    from foveal.verbs._adapt import points
    from foveal.verbs._compared import images_per_second

    probabilities = adapted.probabilities(adapted.test, prepared.dataset.task)
    return {
        "method": name,
        "seed": seed,
        "split": "test",
        **points(probabilities, adapted.test.labels.numpy(), prepared),
        "seconds": round(adapted.seconds, 3),
        "trained_params": adapted.trained_params,
        "total_params": adapted.total_params,
        "images_per_second": images_per_second(adapted, prepared, device),
    }


def reference_row(
    name: str, seed: int, probabilities: np.ndarray, labels: np.ndarray, prepared: Prepared
) -> dict[str, Any]:
    from foveal.verbs._adapt import points

    cost = dict.fromkeys(("seconds", "trained_params", "total_params", "images_per_second"))
    return {"method": name, "seed": seed, "split": "test", **points(probabilities, labels, prepared), **cost}


def text(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, best first, references last."""
    from foveal.verbs._adapt import METRICS
    from foveal.verbs._compared import summarise

    columns = ["method", "seeds", *METRICS, "seconds", "trained_params", "total_params", "images_per_second"]
    return table(summarise(rows), columns)
