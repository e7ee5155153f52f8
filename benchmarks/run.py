"""Speed and memory of the spine, as ratios of things measured in one run; writes docs/benchmarks.md.

    python benchmarks/run.py [--only NAME,...] [--fastai PYTHON]

Every figure comes from fresh processes with a fresh feature cache. `--fastai` names the Python of an environment that
has fastai and timm (see versus_fastai.py); without it that table is left as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library import libraries
from serve import served

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"

BARE_PASS = """
import sys, time, json
start = time.perf_counter()
import numpy as np, onnxruntime as ort
from foveal.data.open import open_dataset
from foveal.data.images import to_pixels
from foveal.core.preprocessing import Preprocessing
plan = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875)
data = open_dataset("sample:elpv")
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
begin = time.perf_counter()
for first in range(0, len(data), 32):
    batch = np.stack([to_pixels(data.image(i), plan) for i in range(first, min(first + 32, len(data)))])
    session.run(None, {name: batch})
print(json.dumps({"inside": time.perf_counter() - begin}))
"""

FIT = """
import sys, time, json
begin = time.perf_counter()
import foveal
foveal.fit("sample:elpv", method=sys.argv[1], out=sys.argv[2], offline=True)
print(json.dumps({"inside": time.perf_counter() - begin}))
"""

FIT_AGAIN = """
import sys, time, json
import foveal
foveal.fit("sample:elpv", method=sys.argv[1], out=sys.argv[2] + "-first", offline=True)
begin = time.perf_counter()
foveal.fit("sample:elpv", method=sys.argv[1], out=sys.argv[2], offline=True)
print(json.dumps({"inside": time.perf_counter() - begin}))
"""

COMPARE = """
import sys, time, json
begin = time.perf_counter()
import foveal
foveal.compare("sample:elpv", methods="frozen", out=sys.argv[1], offline=True)
print(json.dumps({"inside": time.perf_counter() - begin}))
"""

THROUGHPUT = """
import json, time, statistics
import numpy as np, torch
from foveal.backbones.adapter import load_backbone, normalise
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.features.session import feature_session
backbone = load_backbone("tf_efficientnet_lite0", offline=True).eval()
data = open_dataset("sample:elpv")
pixels = np.stack([to_pixels(data.image(i), backbone.preprocessing) for i in range(0, 2560, 10)])
session = feature_session(backbone, device="cpu")

@torch.inference_mode()
def eager(batch):
    return backbone(normalise(torch.from_numpy(batch), backbone.preprocessing)).numpy()

def timed(run):
    start = time.perf_counter()
    out = np.concatenate([run(pixels[i : i + 32]) for i in range(0, len(pixels), 32)])
    return len(pixels) / (time.perf_counter() - start), out

timed(session), timed(eager)
rates = [(timed(session), timed(eager)) for _ in range(5)]
a, b = rates[0][0][1], rates[0][1][1]
print(json.dumps({
    "threads": torch.get_num_threads(), "engine": session.engine,
    "foveal": statistics.median(r[0][0] for r in rates), "eager": statistics.median(r[1][0] for r in rates),
    "ratio": statistics.median(r[0][0] / r[1][0] for r in rates),
    "relative_difference": float(np.abs(a - b).max() / np.abs(b).max()),
}))
"""

GRAPH = """
import time, json
from foveal.backbones.adapter import load_backbone
from foveal.features.session import feature_session
from foveal.core.folders import cache_root
begin = time.perf_counter()
feature_session(load_backbone("tf_efficientnet_lite0", offline=True), device="cpu")
graph = next((cache_root() / "graphs").rglob("*.onnx"))
print(json.dumps({"inside": time.perf_counter() - begin, "graph": str(graph)}))
"""


def run(code: str, *arguments: str, cache: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run code in a fresh process; its last line of output is JSON. Adds wall seconds and peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [python, "-c", code, *arguments],
        env={**os.environ, "FOVEAL_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"a measured process failed: {code[:80]} {arguments}")
    return {**json.loads(output.splitlines()[-1]), "wall": time.perf_counter() - start, "peak": usage.ru_maxrss / 1024}


def with_graph(folder: Path, name: str) -> Path:
    """A feature cache that holds the exported graph and nothing else."""
    cache = folder / name
    shutil.copytree(folder / "graph", cache)
    return cache


def throughput(folder: Path) -> list[str]:
    found = run(THROUGHPUT, cache=folder / "throughput")
    return [
        f"| frozen-feature throughput over PyTorch eager fp32, {found['threads']} threads, same decoded images "
        f"| at least 3 | **{found['ratio']:.1f}** ({found['foveal']:.0f} against {found['eager']:.0f} images/s) |",
        "| largest difference of features from torch's, relative | at most 1e-3 "
        f"| **{found['relative_difference']:.1e}** |",
    ]


def fits(folder: Path) -> list[str]:
    graph = run(GRAPH, cache=folder / "graph")
    rows: list[str] = []
    bare, cold, warm, compared = [], [], [], []
    for turn in range(3):
        cache = with_graph(folder, f"fit-{turn}")
        out = str(folder / f"out-{turn}")
        bare.append(run(BARE_PASS, graph["graph"], cache=cache))
        cold.append(run(FIT, "linear", f"{out}-cold", cache=cache))
        warm.append(
            run(FIT, "linear", f"{out}-warm", cache=cache)
            | {"again": run(FIT_AGAIN, "linear", f"{out}-again", cache=cache)["inside"]}
        )
        compared.append(run(COMPARE, f"{out}-compare", cache=with_graph(folder, f"compare-{turn}")))

    def ratio(above: list[dict[str, Any]], below: list[dict[str, Any]], key: str, over: str = "") -> float:
        return statistics.median(a[key] / b[over or key] for a, b in zip(above, below, strict=True))

    median = lambda entries, key: statistics.median(entry[key] for entry in entries)  # noqa: E731
    rows.append(
        f"| cold `fit --method linear` over a bare pass (decode + ONNX Runtime), sample:elpv, whole processes "
        f"| at most 1.5 | **{ratio(cold, bare, 'wall'):.2f}** "
        f"({median(cold, 'wall'):.1f} s against {median(bare, 'wall'):.1f} s; "
        f"export of the graph, once per backbone: {graph['inside']:.1f} s) |"
    )
    rows.append(
        f"| warm fit over cold fit, within Python, libraries already imported | under 0.1 | "
        f"**{ratio(warm, cold, 'again', 'inside'):.3f}** "
        f"({median(warm, 'again'):.2f} s against {median(cold, 'inside'):.1f} s) |"
    )
    rows.append(
        f"| warm fit over cold fit, whole processes (imports included) | | {ratio(warm, cold, 'wall'):.2f} "
        f"({median(warm, 'wall'):.1f} s against {median(cold, 'wall'):.1f} s) |"
    )
    rows.append(
        f"| cold `compare` of all frozen-feature methods over one cold fit | at most 1.3 | "
        f"**{ratio(compared, cold, 'wall'):.2f}** ({median(compared, 'wall'):.1f} s) |"
    )
    return rows


def memory(folder: Path) -> list[str]:
    """Twenty copies of the ELPV images, as a CSV and a folder of files."""
    from foveal.data.open import open_dataset

    data = open_dataset("sample:elpv")
    peaks: dict[int, float] = {}
    for copies in (1, 20):
        place = folder / f"copies-{copies}"
        for index in range(len(data)):
            content = data.read(index)
            for copy in range(copies):
                file = place / data.classes[data.labels[index]] / f"{index:05d}-{copy:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        code = FIT.replace('"sample:elpv"', repr(str(place)))
        peaks[copies] = run(
            code, "linear", str(folder / f"memory-{copies}"), cache=with_graph(folder, f"memory-cache-{copies}")
        )["peak"]
        shutil.rmtree(place)
    return [
        f"| peak memory of `fit` on 52,480 images (twenty copies of sample:elpv) over one copy | at most 1.3 | "
        f"**{peaks[20] / peaks[1]:.2f}** ({peaks[20]:.0f} MiB against {peaks[1]:.0f} MiB) |"
    ]


def help_time(folder: Path) -> list[str]:
    foveal = str(Path(sys.executable).parent / "foveal")
    times: list[float] = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run([foveal, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return [f"| `foveal --help`, seconds | under 0.6 | **{statistics.median(times[1:]):.2f}** |"]


PARTS: dict[str, Callable[[Path], list[str]]] = {
    "throughput": throughput,
    "fits": fits,
    "memory": memory,
    "help": help_time,
    "serve": served,
    "library": libraries,
}


def between(page: str, mark: str, content: str) -> str:
    start, end = f"<!-- {mark} -->", f"<!-- end {mark} -->"
    head, _, rest = page.partition(start)
    return f"{head}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--fastai", help="Python of an environment with fastai and timm")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "fits" not in given.only:
            run(GRAPH, cache=folder / "graph")
        for part in filter(None, given.only.split(",")):
            rows = PARTS[part](folder)
            print("\n".join(rows), flush=True)
            page = PAGE.read_text(encoding="utf-8")
            where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
            table = ["| what | bar | measured |", "|---|---|---|", *rows, "", f"({where}, {time.strftime('%Y-%m-%d')})"]
            PAGE.write_text(between(page, part, "\n".join(table)), encoding="utf-8")
        if given.fastai:
            from versus_fastai import versus

            PAGE.write_text(
                between(PAGE.read_text(encoding="utf-8"), "fastai", versus(given.fastai, folder)), encoding="utf-8"
            )


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
