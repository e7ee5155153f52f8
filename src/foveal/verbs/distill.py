"""`foveal distill`: a Bundle as teacher, a smaller backbone as student, a Bundle out."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from foveal.core.errors import UsageError
from foveal.core.progress import Progress
from foveal.verbs.fit import (
    DEFAULT_BACKBONE,
    BudgetOption,
    DataArgument,
    DeviceOption,
    OfflineOption,
    WeightsOption,
    default_out,
)

if TYPE_CHECKING:
    from foveal.ship.bundle import Bundle


def distill(
    teacher: Annotated[Path, "Bundle folder made by `foveal fit`; its classifier must be one linear layer."],
    data: DataArgument,
    *,
    student: Annotated[str, "Backbone of the student: any timm model name, or a local file as ARCH@FILE."] = (
        DEFAULT_BACKBONE
    ),
    scratch: Annotated[bool, "Start the student from random weights; no pretrained ones are looked for."] = False,
    method: Annotated[str, "NAME or NAME:key=value,... of a distill method."] = "srd-ossl",
    unlabelled: Annotated[Path | None, "Folder of images that join training without labels, of any classes."] = None,
    baseline: Annotated[bool, "Also train the student on the labels alone, for as many steps, and report it."] = False,
    out: Annotated[Path | None, "Folder of the student's Bundle; default runs/DATA-METHOD."] = None,
    seed: Annotated[int | None, "Rules split, initialisation, order and augmentation; default: the teacher's."] = None,
    budget: BudgetOption = None,
    class_weights: WeightsOption = "auto",
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Bundle:
    """Train a small student beside a teacher that is already trained, and write an ordinary Bundle of the student.

    The teacher answers and never changes. Its report measures teacher and student on the same test images and times
    both in the same run. Stopped or killed, the same command with the same --out goes on where it was.

    Example: foveal distill runs/digits sample:digits --student test_efficientnet --scratch --out runs/small
    """
    from foveal.core.bundle import write_json
    from foveal.core.folders import claim
    from foveal.ship.bundle import load_classifier
    from foveal.train.processes import Team
    from foveal.verbs._distilled import Lesson, choose, lesson, taught
    from foveal.verbs._prepare import check_choices, parse_budget
    from foveal.verbs._write import finished, request_of, write_bundle

    progress = progress or Progress()
    start = time.perf_counter()
    seconds = parse_budget(budget)
    check_choices(device=device, class_weights=class_weights)
    if baseline and seconds is not None:
        raise UsageError(
            "--baseline compares equal numbers of steps: leave out --budget, or set epochs=N of the method"
        )
    chosen = choose(method)
    master = load_classifier(teacher)
    seed = int(master.manifest["seed"]) if seed is None else seed
    out = Path(out) if out else default_out(data, method)
    request = request_of(data, method, master.manifest["request"]["backbone"], seed, class_weights) | {
        "teacher": master.fingerprint,
        "student": student,
        "scratch": scratch,
        "unlabelled": str(unlabelled) if unlabelled else None,
        "baseline": baseline,
    }
    team = Team(device)
    if team.agree(lambda: finished(out, request)):
        progress.say(f"{out} already holds the Bundle of this very command")
        return load_classifier(out)
    with team.main_first():
        given: Lesson = lesson(
            master, data, student, scratch=scratch, unlabelled=unlabelled, seed=seed, offline=offline, device=device,
            progress=progress,
        )  # fmt: skip
    work = out.with_name(out.name + ".work")
    _held = claim(work) if team.main else None
    if team.main:
        write_json(work / "request.json", request)
    adapted, record = taught(
        chosen, given, class_weights, baseline=baseline, device=device, work=work, budget=seconds, progress=progress
    )
    if team.main:
        write_bundle(
            out, given.prepared, given.splits, adapted, None,
            request=request, seed=seed, class_weights=class_weights, device=device, started=start, progress=progress,
            lineage={"why": f"distilled from {teacher}", "teacher": given.described()},
            metrics_too={"distilled": record},
        )  # fmt: skip
        shutil.rmtree(work, ignore_errors=True)
    team.wait()
    return load_classifier(out)
