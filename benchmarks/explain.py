"""Explanations beside captum's occlusion and RISE-like masks: how many passes for the same deletion score, and memory.

    python benchmarks/explain.py [--only passes,memory] [--photos N]

Everything in one part comes from one run on the same photos, network and session. Writes docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.run import PAGE, between, run  # noqa: E402
from reproductions.explain.sobol_attribution import rise_map  # noqa: E402

from foveal.backbones.adapter import DEFAULT, imagenet_classifier, load_backbone  # noqa: E402
from foveal.backbones.wrapper import OpenModel, Scorer  # noqa: E402
from foveal.data.images import to_pixels  # noqa: E402
from foveal.data.photos import photos  # noqa: E402
from foveal.evaluate.explanation import follow, rivals  # noqa: E402
from foveal.features.scorer import feature_scorer  # noqa: E402
from foveal.methods.explain.sobol_attribution import Options, SobolAttribution  # noqa: E402

SIZE, CELLS, STEPS = 160, 10, 50
"""The cells that deletion hides are aligned with no method's own."""
SOBOL = ((4, 8), (5, 8), (6, 8), (6, 16), (6, 32))
EFFECT, SEEDS = ((5, 1), (6, 1), (5, 2), (6, 2), (6, 4), (6, 8)), 3
"""Grids and points of `index=effect`, chosen on other photos; its contexts are random, so that seeds are averaged."""
OCCLUSION = ((64, 32), (32, 32), (40, 20), (48, 16), (32, 16), (64, 8), (48, 8), (32, 8), (48, 4))
RISE = (250, 500, 1000, 2000)
Maps = dict[tuple[str, int, int], torch.Tensor]
"""By family, number of passes and seed."""


def maps_of(model: Scorer, image: torch.Tensor, target: int) -> Maps:
    from captum.attr import Occlusion

    found: Maps = {}
    for grid, points in SOBOL:
        method = SobolAttribution(Options(grid=grid, points=points))
        found["sobol", method.passes(), 0] = method.explain(model, image, torch.tensor([target]))[0]
    for (grid, points), seed in product(EFFECT, range(SEEDS)):
        method = SobolAttribution(Options(grid=grid, points=points, index="effect", seed=seed))
        found["sobol effect", method.passes(), seed] = method.explain(model, image, torch.tensor([target]))[0]
    for window, stride in OCCLUSION:
        attribution = Occlusion(model).attribute(
            image,
            target=target,
            sliding_window_shapes=(3, window, window),
            strides=(3, stride, stride),
            baselines=model.neutral.expand_as(image),
            perturbations_per_eval=model.batch,
        )
        passes = (-(-(SIZE - window) // stride) + 1) ** 2 + 1
        found["captum occlusion", passes, 0] = attribution[0].mean(0).float()
    for passes in RISE:
        found["RISE", passes, 0] = rise_map(model, image[0], target, passes, seed=0)
    return found


def passes_part(folder: Path, count: int) -> list[str]:
    backbone = load_backbone(DEFAULT, size=SIZE, offline=True)
    classifier = imagenet_classifier(offline=True)
    model = feature_scorer(backbone, lambda features: classifier.head(features).softmax(1), device="cpu")
    deletion: dict[tuple[str, int], list[float]] = {}
    seconds = {"session": 0.0, "torch": 0.0}
    largest = 0.0
    for number, photo in enumerate(list(photos().values())[:count]):
        image = torch.from_numpy(to_pixels(photo, backbone.preprocessing).copy()).permute(2, 0, 1)[None].float() / 255
        target = int(model(image).argmax())
        maps = maps_of(model, image, target)
        maps |= {("random", 0, draw): map for draw, map in enumerate(random_maps())}
        named = {" ".join(map(str, key)): each for key, each in maps.items()}

        def score(images: torch.Tensor, target: int = target) -> torch.Tensor:
            return model.of(images, torch.full((len(images),), target))

        curves = follow(score, image[0], named, model.neutral, cells=CELLS, steps=STEPS)
        for key in maps:
            deletion.setdefault(key[:2], []).append(curves[" ".join(map(str, key))].areas()["deletion"])
        if number == 0:
            slow = OpenModel(classifier, backbone.preprocessing, answer=lambda x: classifier(x).softmax(1))
            method = SobolAttribution(Options(grid=4, points=8))
            both = []
            slow(image)  # the first call alone is slower
            for name, each in (("session", model), ("torch", slow)):
                start = time.perf_counter()
                both.append(method.explain(each, image, torch.tensor([target])))
                seconds[name] = time.perf_counter() - start
            largest = float((both[0] - both[1]).abs().max() / both[1].max())
    means = {key: float(np.mean(values)) for key, values in deletion.items()}
    for key, mean in means.items():
        print(*key, f"{mean:.4f}", flush=True)
    rows = [f"| deletion score, cells at random | | {means['random', 0]:.3f} |"]
    for family in ("sobol", "sobol effect", "captum occlusion", "RISE"):
        shown = ", ".join(f"{means[key]:.3f} with {key[1]:,}" for key in sorted(means) if key[0] == family)
        rows.append(f"| deletion score of {family} by passes, mean of {count} photos, lower is better | | {shown} |")
    for ours, theirs in product(("sobol", "sobol effect"), ("captum occlusion", "RISE")):
        rows.append(
            f"| passes of {theirs} at its best deletion score over passes of {ours} that score as low | at least 2 "
            f"| {ratio(theirs, ours, means)} |"
        )
    rows.append(
        "| sobol-attribution in the fast session over torch: time, and largest difference of the map | runs "
        f"| **{seconds['torch'] / seconds['session']:.1f}** times as fast, {largest:.1e} of its maximum |"
    )
    return rows


def random_maps() -> list[torch.Tensor]:
    drawn = rivals((SIZE, SIZE), cells=CELLS, draws=5)
    return [map for name, map in drawn.items() if name.startswith("random")]


def ratio(theirs: str, ours: str, means: dict[tuple[str, int], float]) -> str:
    """At the best score that one family reaches: its fewest passes over the fewest of ours that score as low."""
    best, passes = min((value, passes) for (family, passes), value in means.items() if family == theirs)
    enough = [passes for (family, passes), value in means.items() if family == ours and value <= best]
    if not enough:
        nearest = min((value, passes) for (family, passes), value in means.items() if family == ours)
        return (
            f"**missed**: {theirs} has {best:.3f} with {passes:,} passes, "
            f"{ours} at best {nearest[0]:.3f} with {nearest[1]:,}"
        )
    return f"{bold(passes / min(enough))} ({passes:,} against {min(enough):,} for {best:.3f})"


def bold(share: float) -> str:
    return f"**{share:.2f}**" if share >= 2 else f"**missed**: {share:.2f}"


MEMORY = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from foveal.backbones.adapter import load_backbone
from foveal.backbones.wrapper import OpenModel
from foveal.core import catalogue
from foveal.core.method import Classifier
name, choice, images = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
backbone = load_backbone(name, pretrained=False)
model = OpenModel(Classifier(backbone, nn.Linear(backbone.width, 5)).eval(), backbone.preprocessing)
x = torch.rand(images, 3, 224, 224)
catalogue.create(choice).explain(model, x, torch.zeros(images, dtype=torch.int64))
with open("/proc/self/status") as file:  # what getrusage tells begins at the size of the process that started this one
    high = next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
print(json.dumps({"high": high}))
"""


def memory_part(folder: Path, count: int) -> list[str]:
    rows: list[str] = []
    for kind, name in (
        ("CNN", "tf_efficientnet_lite0"),
        ("ViT", "vit_tiny_patch16_224"),
        ("windowed ViT", "swin_tiny_patch4_window7_224"),
    ):
        for what, small, large in (
            ("sobol-attribution, 17 x 17 cells over 4 x 4", ("sobol-attribution:grid=4,points=2", "1"),
             ("sobol-attribution:grid=17,points=2", "1")),
            ("eigen-cam, 128 images over 32", ("eigen-cam", "32"), ("eigen-cam", "128")),
        ):  # fmt: skip
            low, high = (run(MEMORY, name, *each, cache=folder / "memory")["high"] for each in (small, large))
            rows.append(
                f"| peak memory on a {kind}: {what} | at most 1.3 | **{high / low:.2f}** "
                f"({high:,.0f} MiB against {low:,.0f} MiB) |"
            )
    return rows


PARTS: dict[str, tuple[str, Callable[[Path, int], list[str]]]] = {
    "passes": ("explain", passes_part),
    "memory": ("explain-memory", memory_part),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--photos", type=int, default=5, help="fewer photos for a quick look; nothing is written then")
    given: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for part in given.only.split(","):
            mark, measure = PARTS[part]
            rows = measure(Path(name), given.photos)
            print("\n".join(rows), flush=True)
            where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
            table = ["| what | bar | measured |", "|---|---|---|", *rows, "", f"({where}, {time.strftime('%Y-%m-%d')})"]
            if given.photos == 5:
                page = PAGE.read_text(encoding="utf-8")
                PAGE.write_text(between(page, mark, "\n".join(table)), encoding="utf-8")


if __name__ == "__main__":
    main()
