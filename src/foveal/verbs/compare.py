"""`foveal compare`: several methods on the same images, splits, seeds and budget."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

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

RayOption = Annotated[
    str | None,
    "Work on a Ray cluster: local (this machine's processors), auto (the cluster it belongs to) or HOST:PORT.",
]


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
    ray: RayOption = None,
    progress: Progress | None = None,
) -> Result:
    """Measure methods side by side on held-out images, beside two reference rows.

    A method that cannot work on the backbone is named and left out. Writes comparison.json, comparison.csv and
    comparison.html. Stopped or killed, the same command goes on, with or without --ray.

    Example: foveal compare sample:digits --methods linear,gda-clip --seeds 2
    """
    import shutil
    import time

    from foveal.core.errors import BackboneError, UsageError
    from foveal.core.folders import claim
    from foveal.verbs._adapt import check_suits, choose
    from foveal.verbs._compared import Ledger, check_out, write_tables
    from foveal.verbs._prepare import check_choices, parse_budget, prepare
    from foveal.verbs._race import frozen_methods
    from foveal.verbs._reference import reference_probabilities
    from foveal.verbs._trials import Terms, one_by_one, reference_row
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
    with reached(ray) as cluster:
        started = time.perf_counter()
        prepared = prepare(data, backbone, offline=offline, device=device, split=True, progress=progress)
        reading = time.perf_counter() - started
        names: list[str] = []
        for choice in choices:
            names += frozen_methods(prepared.dataset.task) if choice == "frozen" else [choice]
        chosen = {name: check_suits(choose(name), prepared) for name in dict.fromkeys(names)}

        request = {"data": str(data), "backbone": backbone, "class_weights": class_weights, "budget": budget}
        work = out.with_name(out.name + ".work")
        _held = claim(work)
        ledger = Ledger(work, request)
        runs = range(seed, seed + seeds)
        trials = [(name, run) for run in runs for name in chosen if not ledger.has(name, run)]
        terms = Terms(class_weights, device, limit, ledger.folder.absolute())
        if cluster is None:
            outcomes = one_by_one(prepared, trials, terms, progress)
        else:
            from foveal.verbs._ray import Shipped, on_ray

            frozen = any(chosen[name].reads_features() for name, _ in trials)
            shipped = Shipped.of(prepared, data, features=frozen, offline=offline)
            splits = {run: prepared.splits(run) for run in dict.fromkeys(run for _, run in trials)}
            outcomes = on_ray(cluster, shipped, splits, trials, terms, progress)
        refused: dict[str, BackboneError] = {}
        for name, _, outcome in outcomes:
            if not isinstance(outcome, BackboneError):
                ledger.add(outcome)
            elif name not in refused:
                refused[name] = outcome
                progress.say(f"{name} is left out: {outcome}")
    kept = [name for name in chosen if name not in refused]
    if not kept:
        raise next(iter(refused.values()))
    for run in runs:
        if ledger.has("brightness", run):
            continue
        splits_of_run = prepared.splits(run)
        labels = prepared.dataset.labels[splits_of_run == "test"]
        for name, probabilities in reference_probabilities(prepared, splits_of_run, run, class_weights).items():
            ledger.add(reference_row(name, run, probabilities, labels, prepared))
    table_rows = ledger.rows([*kept, "majority", "brightness"], runs)
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


def reached(address: str | None) -> AbstractContextManager[Any]:
    """The Ray cluster at an address, connected; None without one."""
    if address is None:
        return nullcontext()
    from foveal.verbs._ray import cluster

    return cluster(address)


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


def text(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, best first, references last."""
    from foveal.verbs._adapt import METRICS
    from foveal.verbs._compared import summarise

    columns = ["method", "seeds", *METRICS, "seconds", "trained_params", "total_params", "images_per_second"]
    return table(summarise(rows), columns)
