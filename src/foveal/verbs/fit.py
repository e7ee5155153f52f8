"""`foveal fit`: a folder of images in, a Bundle out."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

if TYPE_CHECKING:
    from foveal.data.dataset import Dataset

from foveal.core.errors import UsageError
from foveal.core.progress import Progress
from foveal.core.task import OTHER_TASKS, OtherTask

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
ROOMS: dict[OtherTask, str] = {"landmarks": "dense", "video": "video", "forecast": "motion", "image-text": "language"}
"""The family of methods for each task but classifying images."""
DataArgument = Annotated[
    str,
    "Folder of class folders, folder with train/val/test, CSV or Parquet (image,label[,split]), WebDataset .tar "
    "or brace pattern, hub:owner/name, or sample:NAME.",
]
BackboneOption = Annotated[
    str,
    "Any timm model name, vit (weights come with foveal), a folder made by `foveal pretrain`, or a local .safetensors "
    "file as ARCH@FILE.",
]
SeedOption = Annotated[int, "Rules split, initialisation, order and augmentation."]
OfflineOption = Annotated[bool, "Open no network connection."]
DeviceOption = Annotated[str, "auto, cpu or cuda."]
WeightsOption = Annotated[str, "Class weights: auto (every class counts alike) or none."]
BudgetOption = Annotated[str | None, "Stop training after this time, such as 90s, 10m or 2h."]


def fit(
    data: DataArgument,
    *,
    task: Annotated[str | None, f"{', '.join(OTHER_TASKS)}; default: what the method does, else classify."] = None,
    method: Annotated[
        str, "NAME or NAME:key=value,...; auto races the frozen-feature methods, with --scratch it is full."
    ] = "auto",
    backbone: BackboneOption = DEFAULT_BACKBONE,
    scratch: Annotated[bool, "Start the backbone from random weights; no pretrained ones are looked for."] = False,
    out: Annotated[Path | None, "Folder of the Bundle; default runs/DATA-METHOD."] = None,
    seed: SeedOption = 0,
    budget: BudgetOption = None,
    class_weights: WeightsOption = "auto",
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Any:
    """Adapt a pretrained backbone to labelled images and write a Bundle: model, calibration, metrics, report.

    With --scratch the backbone starts from random weights, drawn by --seed, as for an architecture that has no
    pretrained ones: every parameter is trained, which takes many images and epochs (--method full:epochs=100).
    Stopped or killed, the same command with the same --out goes on where it was. Under torchrun or accelerate launch
    the processes train together and the first writes.

    Example: foveal fit sample:digits --out runs/digits
    """
    from foveal.core.bundle import write_json
    from foveal.core.folders import claim
    from foveal.ship.bundle import load
    from foveal.train.processes import Team
    from foveal.verbs._adapt import FrozenRows, adapt, check_suits, choose
    from foveal.verbs._prepare import check_choices, parse_budget, prepare
    from foveal.verbs._race import race
    from foveal.verbs._scratch import must_suit, random_backbone
    from foveal.verbs._write import finished, request_of, write_bundle

    progress = progress or Progress()
    start = time.perf_counter()
    seconds = parse_budget(budget)
    check_choices(device=device, class_weights=class_weights)
    if other := other_task(task, method):
        if class_weights != "auto":
            raise UsageError(f"--class-weights {class_weights}: {other} has no class weights")
        from foveal.verbs._order import Order

        name = the_method_of(other) if method == "auto" else method
        out = Path(out) if out else default_out(data, name)
        order = Order(data, other, name, backbone, out, seed, seconds, device, offline, scratch, progress, start)
        return import_module(f"foveal.verbs._fit_{other.replace('-', '_')}").fit(order)
    if scratch and method == "auto":
        method = "full"
    chosen = None if method == "auto" else choose(method)
    out = Path(out) if out else default_out(data, method)
    request = request_of(data, method, backbone, seed, class_weights, scratch)
    team = Team(device)
    if team.agree(lambda: finished(out, request)):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load(out)
    frozen = chosen is None or chosen.reads_features()
    if frozen and not team.main:
        team.wait()
        return load(out)

    source: Any = backbone
    if scratch and chosen is not None:
        source = random_backbone(backbone, seed)
        must_suit(chosen, source)
    with team.main_first() if not frozen else nullcontext():
        prepared = prepare(
            data, source, offline=offline, device=device, split=True, featured=not scratch, progress=progress
        )
    chosen = check_suits(chosen, prepared) if chosen else None
    splits = prepared.splits(seed)
    rows = FrozenRows(prepared, splits, seed, class_weights) if frozen else None
    work = out.with_name(out.name + ".work")
    _held = claim(work) if team.main else None
    if team.main:
        write_json(work / "request.json", request)
    if chosen is None:
        assert rows is not None
        adapted, contest = race(prepared, rows, seed, progress)
    else:
        contest = None
        adapted = adapt(
            chosen, prepared, splits, rows, seed, class_weights,
            device=device, work=work, budget=seconds, progress=progress,
        )  # fmt: skip
    if team.main:
        write_bundle(
            out, prepared, splits, adapted, contest,
            request=request, seed=seed, class_weights=class_weights, device=device, started=start, progress=progress,
        )  # fmt: skip
        shutil.rmtree(work, ignore_errors=True)
    team.wait()
    return load(out)


def other_task(task: str | None, method: str) -> OtherTask | None:
    """The task to fit for, unless it is classifying images.

    Raises:
        UsageError: no such task, or one that the method does not do.
    """
    from foveal.core import catalogue
    from foveal.core.options import split_choice

    if task is not None and task not in OTHER_TASKS:
        raise UsageError(f"--task {task}: expected {', '.join(OTHER_TASKS)}, or none to classify images")
    asked = cast("OtherTask | None", task)
    if method == "auto":
        return asked
    name = split_choice(method)[0]
    does = [each for each in catalogue.get(name).spec.tasks if each in OTHER_TASKS]
    if task is not None and task not in does:
        raise UsageError(f"--task {task} --method {name}: {name} does {', '.join(catalogue.get(name).spec.tasks)}")
    return asked or (cast(OtherTask, does[0]) if does else None)


def the_method_of(task: OtherTask) -> str:
    """The one method for a task.

    Raises:
        UsageError: there are several, or none.
    """
    from foveal.core import catalogue

    found = [name for name in catalogue.names(ROOMS[task]) if task in catalogue.get(name).spec.tasks]
    if len(found) != 1:
        raise UsageError(f"--task {task}: choose one with --method ({', '.join(found) or 'there is none'})")
    return found[0]


def default_out(data: str | Path | Dataset, method: str) -> Path:
    """runs/DATA-METHOD in the working folder."""
    name = str(getattr(data, "name", data)).rstrip("/").replace("sample:", "").replace("hub:", "")
    stem = Path(name).name.split(".")[0].split("{")[0].strip("-_") or "data"
    return Path("runs") / f"{stem}-{method.replace(':', '-').replace(',', '-').replace('=', '')}"
