"""`foveal pretrain`: images without labels in, a better backbone out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result, show
from foveal.verbs.fit import DEFAULT_BACKBONE, BackboneOption, BudgetOption, DeviceOption, OfflineOption


def pretrain(
    data: Annotated[
        str, "Images, labelled or not: a folder of images, or any DATA of `fit`; labels are not learnt from."
    ],
    *,
    method: Annotated[str, "NAME or NAME:key=value,... of a pretrain method."] = "spark",
    backbone: BackboneOption = DEFAULT_BACKBONE,
    out: Annotated[Path | None, "Folder of the weights; default runs/DATA-METHOD."] = None,
    scratch: Annotated[bool, "Begin with random weights instead of pretrained ones."] = False,
    size: Annotated[int | None, "Image side in pixels; default the backbone's own."] = None,
    seed: Annotated[int, "Rules initialisation, order, views and masks."] = 0,
    budget: BudgetOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Train a backbone further on images without labels, for `fit --backbone` to start from.

    Writes model.safetensors, weights.json and report.html into --out. Images that the data call 'test' are left out.
    Stopped or killed, the same command with the same --out goes on where it was. Under torchrun or accelerate launch
    the processes train together and the first writes.

    Example: foveal pretrain sample:elpv --method spark:decoder_width=64 --size 96 --budget 10m --out weights
    """
    import copy
    import shutil
    import time
    from dataclasses import replace

    import numpy as np

    from foveal.backbones.adapter import load_backbone
    from foveal.core import catalogue
    from foveal.core.bundle import read_json, write_json
    from foveal.core.errors import UsageError
    from foveal.core.families.pretrain import Pretrain
    from foveal.core.folders import claim
    from foveal.core.options import options_to_dict
    from foveal.core.seeds import derive, seed_everything
    from foveal.features.extract import extract
    from foveal.train.loop import train
    from foveal.train.processes import Team
    from foveal.train.views import ViewFeed
    from foveal.verbs._adapt import report_event
    from foveal.verbs._prepare import check_choices, parse_budget, source_of
    from foveal.verbs._pretrained import Probe, finished, read_pool, write_weights
    from foveal.verbs.fit import default_out
    from foveal.verbs.reproduce import versions

    progress, start = progress or Progress(), time.perf_counter()
    seconds = parse_budget(budget)
    check_choices(device=device)
    chosen = catalogue.create(method)
    if not isinstance(chosen, Pretrain):
        raise UsageError(f"{chosen.name} is of the family {chosen.spec.family}: pretrain takes pretrain methods")
    out = Path(out) if out else default_out(data, method)
    request = {
        "data": source_of(data), "method": method, "backbone": backbone, "scratch": scratch, "size": size, "seed": seed,
    }  # fmt: skip
    team = Team(device)
    if team.agree(lambda: finished(out, request)):
        progress.say(f"{out} already holds the weights of this very command")
        return Result({"folder": str(out), **read_json(out / "weights.json")}, text)

    seed_everything(derive(seed, "init"))
    parent = load_backbone(backbone, pretrained=not scratch, offline=offline, size=size)
    model = chosen.attach(copy.deepcopy(parent).train())
    with team.main_first():
        pool = read_pool(data, parent, offline=offline, device=device, progress=progress)
    work = out.with_name(out.name + ".work")
    _held = claim(work) if team.main else None
    if team.main:
        write_json(work / "request.json", request)
    origin = parent.fingerprint()
    probe = Probe(pool, chosen, parent.preprocessing, seed)
    before = probe(model, pool.features.X[probe.rows])
    feed = ViewFeed(pool.dataset, parent.preprocessing, chosen.views(), f"{pool.fingerprint} {origin}")
    result = train(
        chosen, model, feed, seed, recipe=chosen.recipe(), device=device, work=work, budget_s=seconds,
        on_event=lambda event: report_event(event, chosen.name, progress),
    )  # fmt: skip
    if team.main:
        better = result.model
        better.plan = replace(better.plan, origin=f"{chosen.name} from {parent.origin}")
        features = extract(
            pool.dataset.subset(probe.rows), better, device=device,
            progress=lambda done, total: progress.update("looking again", done, total),
        ).X  # fmt: skip
        model.to("cpu")
        record: dict[str, Any] = {
            "foveal": versions(),
            "backbone": better.describe(),
            "method": {"name": chosen.name, "options": options_to_dict(chosen.options)},
            "parent": {"name": parent.name, "origin": parent.origin, "fingerprint": origin},
            "data": {
                "name": pool.dataset.name,
                "source": source_of(data),
                "images": len(pool.dataset),
                "set_aside": [list(item) for item in pool.dataset.set_aside],
                "fingerprint": pool.fingerprint,
            },
            "seed": seed,
            "request": request,
            "epochs": result.epochs_done,
            "history": result.history,
            "probe": {"images": len(probe.rows), "before": before, "after": probe(model, np.asarray(features))},
            "seconds": round(time.perf_counter() - start, 2),
        }
        write_weights(out, better, record, probe.pictures(model, parent.preprocessing))
        shutil.rmtree(work, ignore_errors=True)
    team.wait()
    return Result({"folder": str(out), **read_json(out / "weights.json")}, text)


def text(content: dict[str, Any]) -> str:
    before, after = content["probe"]["before"], content["probe"]["after"]
    said = f"{content['backbone']['arch']}: {show(content['data']['images'])} images, {content['epochs']:g} epochs"
    said += f", {content['seconds']:.0f} s\nloss {before['loss']:.3f} -> {after['loss']:.3f}"
    if after["blank"] is not None:
        said += f" (a blank answer: {after['blank']:.3f})"
    if after["neighbour_accuracy"] is not None:
        said += f"; labels told by neighbours {before['neighbour_accuracy']:.3f} -> {after['neighbour_accuracy']:.3f}"
    return f"{said}\nfoveal fit DATA --backbone {content['folder']}\n{content['folder']}/report.html"
