"""`foveal search`: an image or words in, the images of a library that are most like them out."""

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
    text: Annotated[str | None, "Words to find images of; `foveal index --help` says which libraries read."] = None,
    k: Annotated[int, "How many images to find."] = 10,
    exact: Annotated[bool, "Compare every vector of a large library, too."] = False,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Find the images of a library that are most like one, or like words, by the cosine of their embeddings.

    Words are read by what made the library: a Bundle of images and texts, CLIP weights, or the default backbone, which
    knows words near ImageNet's classes (the first time it reads all their names, which takes half a minute).

    Example: foveal search library --text "a cup of coffee" -k 5
    """
    from foveal.core.errors import DataError, UsageError
    from foveal.data.dataset import printable, read_file
    from foveal.data.images import decode, to_pixels
    from foveal.features.session import feature_session
    from foveal.ship.embedder import embedder_of
    from foveal.ship.library import open_library
    from foveal.verbs._prepare import check_choices

    progress = progress or Progress()
    check_choices(device=device)
    if k < 1:
        raise UsageError(f"-k {k}: expected 1 or more")
    if (image is None) == (text is None):
        given = "nothing to search for" if image is None else "both --image and --text"
        raise UsageError(f"{given}: give --image FILE or --text WORDS")
    opened = open_library(library)
    embedder = embedder_of(opened, offline=offline)
    if text is not None:
        query = embedder.words(
            text, offline=offline, progress=lambda done, total: progress.update("reading names", done, total)
        )
    else:
        try:
            pixels = to_pixels(decode(read_file(str(image))), embedder.backbone.preprocessing)
        except DataError as error:
            raise DataError(f"{printable(str(image))}: {error}") from None
        query = embedder.vectors(feature_session(embedder.backbone, device=device)(pixels[None]))
    numbers, similar = opened.search(query, k, exact=exact)
    there = numbers[0] >= 0
    rows = opened.rows(numbers[0][there].tolist())
    hits = [
        {"rank": rank, "similarity": round(float(value), 6), **row}
        for rank, (row, value) in enumerate(zip(rows, similar[0][there], strict=True), 1)
    ]
    asked = {"image": None if image is None else str(image), "text": text}
    return Result({"library": str(library), **asked, "engine": "exact" if exact else opened.engine, "hits": hits}, said)


def said(content: dict[str, Any]) -> str:
    return table(content["hits"], ["rank", "similarity", "id", "label", "source"])
