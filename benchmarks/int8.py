"""`foveal export --int8` on three kinds of backbone; writes the int8 section of docs/benchmarks.md.

    python benchmarks/int8.py [--only NAME,...]

Only EfficientNet-Lite0 has weights that come with a package. The other backbones have random weights, saved to a file:
their latencies are those of trained ones, and their accuracy is that of a linear head fitted on random features, which
says how far int8 changes answers and no more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from run import PAGE, between

CASES = {
    "lite0-elpv": ("tf_efficientnet_lite0", "sample:elpv", True),
    "lite0-textile": ("tf_efficientnet_lite0", "sample:textile", True),
    "resnet18": ("resnet18", "sample:digits", False),
    "vit-tiny": ("vit_tiny_patch16_224", "sample:digits", False),
}
HEADER = [
    "| backbone, data | variant | batch 1, ms | batch 8, ms | times fp32 | MB | balanced accuracy | drop | "
    "same `unknown`, known and garbage | |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def bundle_of(case: str, folder: Path) -> Path:
    """A linear head fitted on the case's backbone and data."""
    import torch
    from safetensors.torch import save_file

    import foveal
    from foveal.backbones.adapter import load_backbone

    backbone, data, pretrained = CASES[case]
    name = backbone
    if not pretrained:
        torch.manual_seed(0)
        loaded = load_backbone(backbone, pretrained=False)
        settle(loaded, data)
        weights = loaded.model.state_dict()
        save_file({key: value.clone() for key, value in weights.items()}, folder / f"{backbone}.safetensors")
        name = f"{backbone}@{folder / f'{backbone}.safetensors'}"
    foveal.fit(data, method="linear", backbone=name, out=folder / case, offline=True)
    return folder / case


def settle(backbone: Any, data: str) -> None:
    """Statistics of batch norms from 64 images of the data, without which random features all but vanish."""
    import numpy as np
    import torch

    from foveal.backbones.adapter import normalise
    from foveal.data.images import to_pixels
    from foveal.data.open import open_dataset

    images, plan = open_dataset(data), backbone.preprocessing
    rows = np.linspace(0, len(images) - 1, 64).astype(int).tolist()
    pixels = np.stack([to_pixels(images.image(row), plan) for row in rows])
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        backbone.train()(normalise(torch.from_numpy(pixels), plan))
    backbone.eval()


def lines_of(case: str, made: dict[str, Any]) -> list[str]:
    backbone, data, pretrained = CASES[case]
    rows: list[str] = []
    for row in made["variants"]:
        head = f"| {backbone}{'' if pretrained else ' (random weights)'}, {data} | {row['name']} |"
        if "timings" not in row:
            rows.append(f"{head} | | | | | | | {row['reason']} |")
            continue
        one, eight = (timing["milliseconds"] for timing in row["timings"])
        chosen = " **chosen**" if row["name"] == made["chosen"] else ""
        verdict = "accepted" if row["accepted"] else f"refused: {row['reason']}"
        rows.append(
            f"{head} {one:.1f} | {eight:.1f} | {row['speedup']:.2f} | {row['bytes'] / 1e6:.1f} | "
            f"{row['balanced_accuracy']:.3f} | {row['drop']:+.4f} | "
            f"{row['unknown_agreement']:.1%}, {row['garbage_agreement']:.1%} | {verdict}{chosen} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases to measure, separated by commas")
    parser.add_argument("--record", type=Path, help="JSON file that keeps what was measured, for runs in parts")
    given = parser.parse_args()

    import foveal

    record: dict[str, Any] = {}
    if given.record and given.record.is_file():
        record = json.loads(given.record.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        for case in filter(None, given.only.split(",")):
            record[case] = foveal.export(bundle_of(case, Path(name)), int8=True).to_dict()
            print("\n".join(lines_of(case, record[case])), flush=True)
            if given.record:
                given.record.write_text(json.dumps(record), encoding="utf-8")
    cases = [case for case in CASES if case in record]
    threads = record[cases[0]]["variants"][0]["threads"]
    engines = {row["engine"] for case in cases for row in record[case]["variants"] if "timings" in row}
    judged = "; ".join(dict.fromkeys(record[case]["judged_on"].partition(",")[0] for case in cases))
    where = f"{os.cpu_count()} cores, {platform.machine()}, {threads} threads, {', '.join(sorted(engines))}"
    table = [*HEADER, *(line for case in cases for line in lines_of(case, record[case]))]
    table += ["", f"Judged on {judged}. ({where}, {time.strftime('%Y-%m-%d')})"]
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "int8", "\n".join(table)), encoding="utf-8")


if __name__ == "__main__":
    main()
