"""Images -> vectors -> a library: an embedding that is learnt, and the rows that DATA add to a library."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from foveal.backbones.adapter import Backbone, build
from foveal.core import catalogue
from foveal.core.bundle import read_json
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.families.retrieve import Embedding, Retrieve
from foveal.core.folders import cache_root
from foveal.core.options import options_to_dict
from foveal.core.progress import Progress
from foveal.core.seeds import derive, seed_everything
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_pool
from foveal.data.pieces import Pieces, in_pieces
from foveal.features.cache import RowStore
from foveal.features.extract import chunks, run_ahead
from foveal.features.session import Session, feature_session
from foveal.features.table import Part, reader
from foveal.ship.embedder import Embedder
from foveal.ship.library import Library, Rows
from foveal.train.loop import train
from foveal.train.pool import PoolImages
from foveal.verbs._adapt import report_event

PIECE = 2048
"""Images added to a library at once: what a kill loses at most."""


def learnt(
    method: Retrieve,
    data: str | Path | Dataset,
    backbone: Backbone,
    *,
    seed: int,
    work: Path,
    budget: float | None,
    offline: bool,
    device: str,
    progress: Progress,
) -> tuple[Embedder, list[dict[str, Any]]]:
    """A method's embedding of DATA, learnt without their labels, and the history of its training.

    Images of the split 'test' are left out. The backbone is copied, not changed.
    """
    dataset = open_pool(data, offline=offline)
    if dataset.splits is not None:
        dataset = dataset.subset(dataset.splits != "test")
    dataset = readable(dataset, backbone, progress)
    seed_everything(derive(seed, "init"))
    own = Backbone(backbone.plan, build(backbone.plan))
    own.load_state_dict(backbone.state_dict())
    model, recipe = method.attach(own, len(dataset)), method.recipe()
    feed = PoolImages(dataset, model, method, backbone.preprocessing, recipe)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        result = train(
            method, model, feed, seed, recipe=recipe, device=device, work=work, budget_s=budget,
            on_event=lambda event: report_event(event, method.name, progress),
        )  # fmt: skip
    for each in said:
        if issubclass(each.category, UserWarning):
            progress.say(str(each.message))
    embedding = result.model
    if not isinstance(embedding, Embedding) or not isinstance(embedding.backbone, Backbone):
        raise BackboneError(f"{method.name} left no backbone and head behind")
    embedding.backbone.plan = replace(own.plan, origin=f"{method.name} from {backbone.origin}")
    return Embedder(embedding.backbone, embedding.head.requires_grad_(False)), result.history


def readable(dataset: Dataset, backbone: Backbone, progress: Progress) -> Dataset:
    """The images that can be decoded."""

    def fails(rows: list[int]) -> dict[int, str]:
        found: dict[int, str] = {}
        for row in rows:
            try:
                to_pixels(dataset.image(row), backbone.preprocessing)
            except DataError as error:
                found[row] = str(error)
        return found

    errors: dict[int, str] = {}
    with closing(run_ahead(fails, chunks(len(dataset)), cpu_threads())) as parts:
        for done, found in enumerate(parts, 1):
            errors |= found
            progress.update("reading images", min(done * 16, len(dataset)), len(dataset))
    if len(errors) == len(dataset):
        raise DataError(f"none of the {len(dataset)} images of {dataset.name} can be read")
    return dataset.drop(errors) if errors else dataset


def fill(
    library: Library,
    data: str | Path | Dataset,
    source: str,
    embedder: Embedder,
    *,
    offline: bool,
    device: str,
    progress: Progress,
) -> tuple[int, list[list[str]]]:
    """Add the images of DATA that are not in the library yet. Returns how many, and (id, reason) of those set aside."""
    known, aside, added = library.names(source), [], 0
    if is_table(data):
        batches = of_table(data, embedder)
    else:
        pieces = in_pieces(data, PIECE, offline=offline)
        aside += [list(item) for item in pieces.set_aside]
        batches = of_images(pieces, embedder, known, aside, device=device, progress=progress)
    for rows in batches:
        fresh = [row for row, name in enumerate(rows.ids) if name not in known]
        library.add(source, taken(rows, fresh))
        added += len(fresh)
    return added, aside


def of_images(
    pieces: Pieces, embedder: Embedder, known: set[str], aside: list[list[str]], *, device: str, progress: Progress
) -> Iterator[Rows]:
    """The rows of each piece's images that are not `known`; those that cannot be read go to `aside`."""
    backbone, done = embedder.backbone, 0
    session: Session | None = None
    cache: RowStore | None = None
    for piece in pieces.cut:
        images = piece.open()
        aside += [list(item) for item in images.set_aside]
        fresh = [row for row in range(len(images)) if images.ids[row] not in known]
        done += len(images) - len(fresh)
        if not fresh:
            continue
        if session is None:
            session = feature_session(backbone, device=device)
            cache = RowStore(cache_root() / "features" / backbone.fingerprint(), np.float32, (backbone.width,))
        read = reader(images, backbone.preprocessing, session, backbone.width, cache)
        found: list[Part] = []
        with closing(
            run_ahead(read, ([fresh[at] for at in some] for some in chunks(len(fresh))), cpu_threads())
        ) as parts:
            for part in parts:
                found.append(part)
                aside += [[images.ids[row], reason] for row, reason in part.failed.items()]
                done += len(part.rows) + len(part.failed)
                progress.update("embedding", done, pieces.images or done)
        rows = [row for part in found for row in part.rows]
        yield Rows(
            ids=[images.ids[row] for row in rows],
            labels=[images.labels[row] for row in rows],
            splits=[images.splits[row] for row in rows],
            sha256=[sha for part in found for sha in part.sha256],
            vectors=embedder.vectors(np.concatenate([part.features for part in found])),
        )


def taken(rows: Rows, some: list[int]) -> Rows:
    return Rows(
        ids=[rows.ids[row] for row in some],
        labels=[rows.labels[row] for row in some],
        splits=[rows.splits[row] for row in some],
        sha256=[rows.sha256[row] for row in some],
        vectors=rows.vectors[some],
    )


def is_table(data: str | Path | Dataset) -> bool:
    """Whether DATA is a feature table that `foveal embed` made."""
    return not isinstance(data, Dataset) and (Path(data) / "table.json").is_file()


def of_table(data: str | Path | Dataset, embedder: Embedder) -> Iterator[Rows]:
    """The rows of a feature table, a shard's row group at a time.

    Raises:
        UsageError: the table was made by another backbone.
        DataError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(str(data))
    try:
        about = read_json(folder / "table.json")
        if about["fingerprint"] != embedder.backbone.fingerprint():
            raise UsageError(
                f"{folder} holds features of {about['backbone']['name']} with other weights than the library's: "
                "give the same --backbone"
            )
        for shard in sorted(folder.glob("part-*.parquet")):
            for batch in pq.ParquetFile(shard).iter_batches(PIECE):
                table = pa.Table.from_batches([batch])
                features = np.asarray(batch.column("features").flatten(), np.float32).reshape(len(batch), -1)
                ids, labels, splits, hashes = (table[name].to_pylist() for name in ("id", "label", "split", "sha256"))
                yield Rows(ids, labels, splits, hashes, embedder.vectors(features))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} cannot be read as a feature table ({error}): make it again") from None


def method_of(choice: str) -> Retrieve:
    """
    Raises:
        UsageError: a method of another family.
    """
    chosen = catalogue.create(choice)
    if not isinstance(chosen, Retrieve):
        able = ", ".join(catalogue.names("retrieve"))
        raise UsageError(f"{chosen.name} is a method to {chosen.spec.family}, not to retrieve: expected one of {able}")
    return chosen


def recorded(method: Retrieve | None) -> dict[str, Any] | None:
    return None if method is None else {"name": method.name, "options": options_to_dict(method.options)}
