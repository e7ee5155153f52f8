"""`foveal search`: an image in, the images of a library that are most like it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result, table
from foveal.verbs.fit import DeviceOption, OfflineOption


def search(
    library: Annotated[Path, "Folder made by `foveal index`."],
    *,
    image: Annotated[Path | None, "Image file to find the like of."] = None,
    text: Annotated[str | None, "Words to find images of; needs a library made by a backbone that reads text."] = None,
    k: Annotated[int, "How many images to find."] = 10,
    exact: Annotated[bool, "Compare every vector of a large library, too."] = False,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Find the images of a library that are most like one, by the cosine of their embeddings.

    Example: foveal search library --image photo.png -k 5
    """
    from foveal.core.errors import DataError, UsageError
    from foveal.data.dataset import printable, read_file
    from foveal.data.images import decode, to_pixels
    from foveal.features.session import feature_session
    from foveal.ship.library import open_library
    from foveal.verbs._library import embedder_of
    from foveal.verbs._prepare import check_choices

    check_choices(device=device)
    if k < 1:
        raise UsageError(f"-k {k}: expected 1 or more")
    opened = open_library(library)
    if text is not None:
        raise UsageError(
            f"{library} was made by {opened.about['backbone']['name']}, which reads images and no text: "
            "search with --image"
        )
    if image is None:
        raise UsageError("nothing to search for: give --image FILE")
    embedder = embedder_of(opened, offline=offline)
    try:
        pixels = to_pixels(decode(read_file(str(image))), embedder.backbone.preprocessing)
    except DataError as error:
        raise DataError(f"{printable(str(image))}: {error}") from None
    features = feature_session(embedder.backbone, device=device)(pixels[None])
    numbers, similar = opened.search(embedder.vectors(features), k, exact=exact)
    there = numbers[0] >= 0
    rows = opened.rows(numbers[0][there].tolist())
    hits = [
        {"rank": rank, "similarity": round(float(value), 6), **row}
        for rank, (row, value) in enumerate(zip(rows, similar[0][there], strict=True), 1)
    ]
    engine = "exact" if exact else opened.engine
    return Result({"library": str(library), "image": str(image), "engine": engine, "hits": hits}, said)


def said(content: dict[str, Any]) -> str:
    return table(content["hits"], ["rank", "similarity", "id", "label", "source"])
