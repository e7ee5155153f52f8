"""`foveal fit`: a folder of images in, a Bundle out."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from foveal.data.dataset import Dataset
    from foveal.ship.bundle import Bundle

from foveal.core.progress import Progress

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
DataArgument = Annotated[
    str,
    "Folder of class folders, folder with train/val/test, CSV or Parquet (image,label[,split]), WebDataset .tar "
    "or brace pattern, hub:owner/name, or sample:NAME.",
]
BackboneOption = Annotated[str, "Any timm model name, or a local .safetensors file as ARCH@FILE."]
SeedOption = Annotated[int, "Rules split, initialisation, order and augmentation."]
OfflineOption = Annotated[bool, "Open no network connection."]
DeviceOption = Annotated[str, "auto, cpu or cuda."]
WeightsOption = Annotated[str, "Class weights: auto (every class counts alike) or none."]
BudgetOption = Annotated[str | None, "Stop training after this time, such as 90s, 10m or 2h."]


def fit(
    data: DataArgument,
    *,
    method: Annotated[str, "NAME or NAME:key=value,...; auto races the frozen-feature methods."] = "auto",
    backbone: BackboneOption = DEFAULT_BACKBONE,
    out: Annotated[Path | None, "Folder of the Bundle; default runs/DATA-METHOD."] = None,
    seed: SeedOption = 0,
    budget: BudgetOption = None,
    class_weights: WeightsOption = "auto",
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Bundle:
    """Adapt a pretrained backbone to labelled images and write a Bundle: model, calibration, metrics, report.

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
    from foveal.verbs._write import finished, request_of, write_bundle

    progress = progress or Progress()
    start = time.perf_counter()
    seconds = parse_budget(budget)
    check_choices(device=device, class_weights=class_weights)
    chosen = None if method == "auto" else choose(method)
    out = Path(out) if out else default_out(data, method)
    request = request_of(data, method, backbone, seed, class_weights)
    team = Team(device)
    if team.agree(lambda: finished(out, request)):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load(out)
    frozen = chosen is None or chosen.reads_features()
    if frozen and not team.main:
        team.wait()
        return load(out)

    with team.main_first() if not frozen else nullcontext():
        prepared = prepare(data, backbone, offline=offline, device=device, split=True, progress=progress)
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


def default_out(data: str | Path | Dataset, method: str) -> Path:
    """runs/DATA-METHOD in the working folder."""
    name = str(getattr(data, "name", data)).rstrip("/").replace("sample:", "").replace("hub:", "")
    stem = Path(name).name.split(".")[0].split("{")[0].strip("-_") or "data"
    return Path("runs") / f"{stem}-{method.replace(':', '-').replace(',', '-').replace('=', '')}"
