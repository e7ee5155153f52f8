"""What embedding and adapting cost from 10^4 to 10^9 images, and what breaks first; writes docs/scale.md.

    OMP_NUM_THREADS=1 python benchmarks/scale.py

Four things are measured: embedded images a second on one core, bytes per row of a feature table, bytes per image of a
listed folder, and time and memory of the near-duplicate search. The rest is multiplication, shown as such.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foveal.backbones.adapter import DEFAULT
from foveal.data.checks import close_pairs
from foveal.data.folder import open_folder
from foveal.data.open import open_dataset
from foveal.features.table import ROW_GROUP

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
IMAGES = 768
SIZES = (10**4, 10**6, 10**8, 10**9)
HASHES = (20_000, 40_000, 80_000)
LISTED = 20_000
SHARD_ROWS = 10_000
CORES = (8, 64, 1024)
EMBED = "import sys, json, foveal; print(json.dumps(foveal.embed(sys.argv[1], out=sys.argv[2], dtype=sys.argv[3],\
 offline=True).to_dict()))"


@dataclass(frozen=True)
class Measured:
    """What the cost model is made of; times in seconds, sizes in bytes."""

    rate: float
    """Images a second on one core."""
    width: int
    row32: float
    row16: float
    image: float
    """Of an image file of the sample."""
    listed: float
    pairs_time: tuple[float, float]
    """Seconds a, exponent b: the near-duplicate search of n images takes a * n ** b."""
    pairs_bytes: float


@dataclass(frozen=True)
class Limit:
    """Something that runs out: how much of it n images need, and how much there is."""

    what: str
    need: Callable[[int], float]
    have: float
    show: Callable[[float], str]
    todo: str


def embedded(data: str, folder: Path, dtype: str) -> dict[str, float]:
    """`foveal embed` in a fresh process on one core, with a feature cache that is empty but for the graph."""
    here = {**os.environ, "FOVEAL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EMBED, data, str(folder / f"table-{dtype}"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=here)
    return json.loads(done.stdout)


def measure(folder: Path) -> Measured:
    sample = open_dataset("sample:elpv")
    photos = folder / "photos"
    (photos / "cell").mkdir(parents=True)
    for row in range(IMAGES):
        (photos / "cell" / f"{row:04d}.png").write_bytes(sample.read(row))
    size = sum(path.stat().st_size for path in photos.rglob("*.png")) / IMAGES
    first = folder / "one"
    (first / "cell").mkdir(parents=True)
    (first / "cell" / "0.png").write_bytes(sample.read(0))
    embedded(str(first), folder, "float32")  # exports the graph
    (folder / "table-float32").rename(folder / "first")
    found = embedded(str(photos), folder, "float32")
    small = embedded(str(photos), folder, "float16")
    many = folder / "many" / "class"
    many.mkdir(parents=True)
    for row in range(LISTED):
        (many / f"image-{row:08d}.jpg").touch()
    tracemalloc.start()
    listed = open_folder(many.parent)
    held = tracemalloc.get_traced_memory()[0] / len(listed)
    tracemalloc.stop()
    times, peak = zip(*(searched(n) for n in HASHES), strict=True)
    slope, offset = np.polyfit(np.log(HASHES), np.log(times), 1)
    return Measured(
        rate=max(found["images_per_second"], small["images_per_second"]),
        width=int(found["width"]),
        row32=found["bytes"] / found["images"],
        row16=small["bytes"] / small["images"],
        image=size,
        listed=held,
        pairs_time=(math.exp(offset), float(slope)),
        pairs_bytes=max(each / n for each, n in zip(peak, HASHES, strict=True)),
    )


def searched(n: int) -> tuple[float, float]:
    """Seconds and peak bytes of the search for near-duplicates among n random hashes."""
    hashes = np.random.default_rng(0).integers(0, 2**63, (n, 4), dtype=np.uint64)
    start = time.perf_counter()
    for _ in close_pairs(hashes, 24):
        pass
    seconds = time.perf_counter() - start
    tracemalloc.start()
    for _ in close_pairs(hashes[: n // 4], 24):
        pass
    peak = tracemalloc.get_traced_memory()[1] * 4
    tracemalloc.stop()
    return seconds, peak


def limits(m: Measured) -> list[Limit]:
    """What runs out, on one machine of 64 cores, 64 GiB of memory and 4 TB of disk, in one day."""
    day, memory, disk, inodes = 86_400.0, 64 * 2**30, 4e12, 4e12 / 16_384
    return [
        Limit("core time of embedding", lambda n: n / m.rate / 64, day, duration, "more cores: `--ray`"),
        Limit("disk, images", lambda n: n * m.image, disk, size, "object or shared storage"),
        Limit(
            "disk, float32 table", lambda n: n * m.row32, disk, size, "`--dtype float16`, or a disk that nodes share"
        ),
        Limit("inodes, one file an image", float, inodes, count, "WebDataset shards"),
        Limit("memory, names of a listed folder", lambda n: n * m.listed, memory, size, "WebDataset shards"),
        Limit("memory, features in `fit`", lambda n: 4 * n * m.width, memory, size, "`fit` on a subset"),
        Limit("near-duplicate search, memory", lambda n: n * m.pairs_bytes, memory, size, "`fit` on a subset"),
        Limit(
            "near-duplicate search, time",
            lambda n: m.pairs_time[0] * n ** m.pairs_time[1],
            day,
            duration,
            "`fit` on a subset",
        ),
    ]


def size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86_400), ("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.2g} s"


def count(number: float) -> str:
    return f"10^{math.log10(number):.0f}" if math.log10(number).is_integer() else f"{number:,.0f}"


def page(m: Measured) -> str:
    columns = [count(n) for n in SIZES]
    lines = [
        f"Measured on {platform.machine()}, one core, {DEFAULT} at 224 pixels, ONNX Runtime, {IMAGES} files of "
        f"{size(m.image)}: **{m.rate:.0f} images a second and core**, decoding included. A row of the table has "
        f"{m.row32:,.0f} bytes in float32 and {m.row16:,.0f} in float16 ({m.width} features, id, label, sha256); "
        f"a listed file costs {m.listed:.0f} bytes of memory; the near-duplicate search takes "
        f"{m.pairs_time[0]:.1e} s times n to the power {m.pairs_time[1]:.2f}, and {m.pairs_bytes:,.0f} bytes an image, "
        "on random hashes (pictures that look alike take longer).",
        "",
        f"| images | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(SIZES)}",
        f"| core hours | {' | '.join(f'{n / m.rate / 3600:,.3g}' for n in SIZES)} |",
    ]
    for cores in CORES:
        lines.append(f"| time on {cores:,} cores | {' | '.join(duration(n / m.rate / cores) for n in SIZES)} |")
    lines += [
        f"| image files | {' | '.join(size(n * m.image) for n in SIZES)} |",
        f"| table, float32 | {' | '.join(size(n * m.row32) for n in SIZES)} |",
        f"| table, float16 | {' | '.join(size(n * m.row16) for n in SIZES)} |",
        f"| shards of {SHARD_ROWS:,} rows | {' | '.join(f'{math.ceil(n / SHARD_ROWS):,}' for n in SIZES)} |",
        f"| lost by a kill, at most, a worker | {' | '.join([duration(SHARD_ROWS / m.rate)] * len(SIZES))} |",
        f"| features held while embedding | {' | '.join([size(2 * ROW_GROUP * 4 * m.width)] * len(SIZES))} |",
        "",
        "Times assume that storage delivers "
        f"{size(m.rate * m.image)} a second for every core, which is what was read here from a local disk.",
        "",
        "What each size needs of one machine with 64 cores, 64 GiB of memory, 4 TB of disk (one inode per 16 KiB) and "
        "a day; what it lacks is bold:",
        "",
        f"| what runs out | {' | '.join(columns)} | there is | then |",
        f"|---|{'---:|' * len(SIZES)}---:|---|",
    ]
    found = limits(m)
    for limit in found:
        needs = [limit.need(n) for n in SIZES]
        cells = [f"**{limit.show(need)}**" if need > limit.have else limit.show(need) for need in needs]
        lines.append(f"| {limit.what} | {' | '.join(cells)} | {limit.show(limit.have)} | {limit.todo} |")
    lines.append("")
    for n in SIZES:
        worst = max(found, key=lambda limit: limit.need(n) / limit.have)
        over = worst.need(n) / worst.have
        verdict = (
            f"{worst.what}, {over:,.1f} times over" if over > 1 else f"nothing; {worst.what} is nearest, {over:.1%}"
        )
        lines.append(f"- {count(n)}: breaks first: {verdict}.")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="foveal-scale-") as folder:
        content = page(measure(Path(folder)))
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- scale -->")
    PAGE.write_text(
        f"{head}<!-- scale -->\n{content}\n<!-- end scale -->{rest.partition('<!-- end scale -->')[2]}", "utf-8"
    )
    print(content)


if __name__ == "__main__":
    main()
