"""`foveal embed`: images in, a table of features out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result, show
from foveal.verbs.compare import RayOption, reached
from foveal.verbs.fit import DEFAULT_BACKBONE, BackboneOption, DeviceOption, OfflineOption

if TYPE_CHECKING:
    from foveal.backbones.adapter import Backbone
    from foveal.data.pieces import Pieces
    from foveal.features.table import About, Shard


def embed(
    data: Annotated[
        str,
        "Images, labelled or not: a folder, CSV or Parquet, WebDataset .tar or brace pattern, hub:owner/name or "
        "sample:NAME.",
    ],
    *,
    out: Annotated[Path | None, "Folder of the table; default runs/DATA-embed."] = None,
    backbone: BackboneOption = DEFAULT_BACKBONE,
    dtype: Annotated[str, "Of the features: float32, or float16 for half the disk."] = "float32",
    shard_rows: Annotated[int, "Images per shard; a tar file becomes one shard, whatever it holds."] = 10_000,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    ray: RayOption = None,
    progress: Progress | None = None,
) -> Result:
    """Fill a feature table: Parquet shards of id, label, split, sha256 and features, and table.json.

    Images stream through; memory stays flat. Stopped or killed, the same command keeps every whole shard and goes on,
    with or without --ray.

    Example: foveal embed sample:digits --out runs/digits-table --dtype float16
    """
    import time

    from foveal.backbones.adapter import load_backbone
    from foveal.core.errors import DataError, UsageError
    from foveal.data.pieces import in_pieces
    from foveal.features.table import About, finish_table, open_table
    from foveal.verbs._prepare import check_choices, source_of
    from foveal.verbs.fit import default_out

    progress = progress or Progress()
    begun = time.perf_counter()
    check_choices(device=device)
    if dtype not in ("float32", "float16"):
        raise UsageError(f"--dtype {dtype}: expected float32 or float16")
    if shard_rows < 1:
        raise UsageError(f"--shard-rows {shard_rows}: expected 1 or more")
    out = (Path(out) if out else default_out(data, "embed")).absolute()
    with reached(ray) as cluster:
        pieces = in_pieces(data, shard_rows, offline=offline)
        loaded = load_backbone(backbone, offline=offline)
        about = About(source_of(data), loaded.describe(), loaded.fingerprint(), loaded.width, dtype, shard_rows)
        open_table(out, about)
        if cluster is None:
            made = here(out, pieces, about, loaded, device, progress)
        else:
            from foveal.verbs._ray import shards_on_ray

            made = shards_on_ray(cluster, out, pieces, about, loaded, device, progress)
        shards = [shard for _, shard in sorted(made, key=lambda found: found[0])]
    aside = [list(item) for item in pieces.set_aside]
    first = next((item for item in [*aside, *(item for shard in shards for item in shard.set_aside)]), None)
    if not any(shard.rows for shard in shards):
        told = f" (first: {first[0]}: {first[1]})" if first else ""
        raise DataError(f"none of the images of {pieces.name} can be read{told}: check that these are images")
    totals = finish_table(out, about, shards, aside, begun)
    if first is not None:
        progress.say(f"{totals['set_aside']} images set aside (first: {first[0]}: {first[1]})")
    return Result({"table": str(out), "backbone": loaded.name, "width": loaded.width, **totals}, text)


def here(
    out: Path, pieces: Pieces, about: About, backbone: Backbone, device: str, progress: Progress
) -> Iterator[tuple[int, Shard]]:
    """Shards made in this process, with all its threads; those that are there already are kept."""
    import numpy as np

    from foveal.features.cache import RowStore, cache_root
    from foveal.features.session import Session, feature_session
    from foveal.features.table import read_shard, shard_path, write_shard

    session: Session | None = None
    cache: RowStore | None = None
    done = 0
    for begun, piece in enumerate(pieces.cut, start=1):
        shard = read_shard(shard_path(out, piece.number), piece.stamp, about)
        if shard is None:
            session = session or feature_session(backbone, device=device)
            if cache is None:
                cache = RowStore(cache_root() / "features" / about.fingerprint, np.float32, (about.width,))

            def told(read: int, of: int, before: int = done, number: int = begun) -> None:
                total = pieces.images or round((before + of) * pieces.count / number)
                progress.update("embedding", before + read, total)

            shard = write_shard(out, piece, about, session, cache=cache, progress=told)
        done += shard.rows + len(shard.set_aside)
        yield piece.number, shard


def text(totals: dict[str, Any]) -> str:
    made = f"{show(totals['computed'])} computed now, {totals['images_per_second']:.0f} a second"
    return (
        f"{show(totals['images'])} images, {totals['width']} features each, {totals['shards']} shards, "
        f"{totals['bytes'] / 2**20:,.1f} MiB ({made})\n{totals['table']}"
    )
