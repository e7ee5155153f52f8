"""`foveal index`: images in, a library to search in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DEFAULT_BACKBONE, BudgetOption, DeviceOption, OfflineOption, default_out


def index(
    data: Annotated[
        str,
        "Images, labelled or not: a folder, CSV or Parquet, WebDataset .tar or brace pattern, hub:owner/name, "
        "sample:NAME, or a feature table of `foveal embed`.",
    ],
    *,
    out: Annotated[Path | None, "Folder of the library, made or added to; default runs/DATA-library."] = None,
    backbone: Annotated[
        str | None,
        "Any timm model name, ARCH@FILE, weights of `foveal pretrain`, a Bundle of images and texts, or "
        "zero-shot:OWNER/NAME (CLIP weights); default: the library's own.",
    ] = None,
    method: Annotated[str | None, "NAME or NAME:key=value,... of a retrieve method: learn the embedding first."] = None,
    seed: Annotated[int, "Rules initialisation, order and clusters of --method."] = 0,
    budget: BudgetOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Make a library of images, or add to one: unit vectors in a LanceDB table, searched by faiss.

    Images that are in the library under their name and source are not read again, so the same command goes on where
    one was stopped, and another DATA adds to it. With --method the embedding is first learnt from DATA, without their
    labels, and kept in the library. Where the data have labels, index.html tells how often a neighbour shares its own.

    What a library was made by decides whether words find something in it, too: the default backbone knows words near
    ImageNet's classes, a Bundle of images and texts (`foveal fit pairs.csv --method clip`) those it learnt.

    Example: foveal index sample:digits --out library
    """
    import shutil
    import time

    from foveal.core.bundle import sha256, write_json
    from foveal.core.errors import DataError, UsageError
    from foveal.core.folders import claim
    from foveal.ship.embedder import embedder_of, load_embedder
    from foveal.ship.library import WEIGHTS, check_free, create_library, faiss, is_library, open_library
    from foveal.verbs._indexed import measured, report
    from foveal.verbs._library import fill, learnt, method_of, recorded
    from foveal.verbs._prepare import check_choices, parse_budget, source_of

    progress, begun = progress or Progress(), time.perf_counter()
    faiss()
    check_choices(device=device)
    seconds = parse_budget(budget)
    chosen = method_of(method) if method else None
    out = Path(out) if out else default_out(data, "library")
    work = out.with_name(out.name + ".work")
    if is_library(out):
        library = open_library(out)
        embedder = embedder_of(library, offline=offline)
        if chosen is not None and library.about["method"] != recorded(chosen):
            raise UsageError(
                f"{out} was not made by {method}: leave --method out to add to it, or choose another --out"
            )
        given = load_embedder(backbone, offline=offline) if backbone is not None and chosen is None else embedder
        if given.fingerprint() != embedder.fingerprint():
            raise UsageError(f"{out} holds vectors of another backbone than {backbone}: choose another --out")
        _held = claim(work)
        write_json(work / "request.json", {"library": str(out)})
    else:
        check_free(out)
        embedder = load_embedder(backbone or DEFAULT_BACKBONE, offline=offline)
        if chosen is not None and embedder.towers is not None:
            raise UsageError(
                f"--method {method} would move the images of {backbone} away from its words: leave --method out, or "
                "name an image backbone"
            )
        _held = claim(work)
        write_json(work / "request.json", {"library": str(out)})
        history: list[dict[str, Any]] = []
        if chosen is not None:
            embedder, history = learnt(
                chosen, data, embedder.backbone, seed=seed, work=work, budget=seconds, offline=offline, device=device,
                progress=progress,
            )  # fmt: skip
        about = {**embedder.describe(), "method": recorded(chosen), "history": history, "weights": None, "sources": {}}
        if embedder.travels():
            out.mkdir(parents=True, exist_ok=True)
            embedder.save(out / WEIGHTS)
            about["weights"] = sha256(out / WEIGHTS)
        library = create_library(out, about)
    source = source_of(data)
    added, aside = fill(library, data, source, embedder, offline=offline, device=device, progress=progress)
    if not len(library):
        told = f" (first: {': '.join(aside[0])})" if aside else ""
        raise DataError(f"none of the images of {source} can be read{told}: check that these are images")
    if aside:
        progress.say(f"{len(aside)} images set aside (first: {': '.join(aside[0])})")
    library.about["sources"][source] = {"added": time.strftime("%Y-%m-%d"), "set_aside": aside}
    library.finish()
    content = {
        "library": str(out),
        "images": len(library),
        "added": added,
        "set_aside": aside,
        "backbone": embedder.backbone.name,
        "method": library.about["method"],
        "width": library.width,
        "words": embedder.reads,
        "engine": library.engine,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "neighbours": measured(library, seed),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    report(out, library, content)
    shutil.rmtree(work, ignore_errors=True)
    return Result(content, text)


def text(content: dict[str, Any]) -> str:
    how = "by comparing all" if content["engine"] == "exact" else "in cells"
    words = "by image, and by words" if content["words"] else "by image"
    lines = [
        f"{content['images']:,} images ({content['added']:,} added now), {content['width']} numbers each, "
        f"{content['bytes'] / 2**20:,.1f} MiB, searched {words}, {how}"
    ]
    if found := content["neighbours"]:
        same = f"{found['recall_at_1']:.1%} of {found['queries']:,} images"
        lines.append(f"the nearest neighbour has the same label for {same}")
    return "\n".join([*lines, f"{content['library']}/index.html"])
