"""foveal beside fastai: the same machine, images, split, backbone weights and seed.

fastai fine-tunes the backbone for four epochs by its own recipe (`Learner.fit_one_cycle`, discriminative rates, its
augmentation); foveal compares its frozen-feature methods from a cold cache. Both are measured on the same test images
by balanced accuracy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA, SEED, EPOCHS = "sample:elpv", 0, 4

FASTAI = """
import json, sys, time
task = json.load(open(sys.argv[1]))
start = time.perf_counter()
import timm, torch
from functools import partial
from safetensors.torch import load_file
from fastai.vision.all import (Callback, CrossEntropyLossFlat, ColReader, DataBlock, CategoryBlock, ImageBlock, Learner,
    Normalize, Resize, aug_transforms, params, set_seed, IndexSplitter)
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
set_seed(task["seed"], reproducible=True)
body = timm.create_model(task["arch"], pretrained=False, num_classes=0)
body.load_state_dict(load_file(task["weights"]))
model = torch.nn.Sequential(body, torch.nn.Linear(body.num_features, len(task["classes"])))
kept = [i for i, s in enumerate(task["splits"]) if s != "test"]
test = [i for i, s in enumerate(task["splits"]) if s == "test"]
def blocks(order, valid):
    return DataBlock((ImageBlock, CategoryBlock(vocab=task["classes"], sort=False)), get_x=lambda i: task["paths"][i],
        get_y=lambda i: task["labels"][i], splitter=IndexSplitter(list(range(len(order) - valid, len(order)))),
        item_tfms=Resize(256), batch_tfms=[*aug_transforms(size=224), Normalize.from_stats([0.5] * 3, [0.5] * 3)],
    ).dataloaders(order, bs=64, num_workers=0)
dls = blocks(kept + test, len(test))
history = []
class Measure(Callback):
    order = 80
    def before_fit(self): self.spent = 0.0
    def before_epoch(self): self.begin = time.perf_counter()
    def before_validate(self): self.spent += time.perf_counter() - self.begin; self.p, self.y = [], []
    def after_pred(self):
        if not self.training: self.p.append(self.pred.softmax(1).detach()); self.y.append(self.yb[0])
    def after_validate(self):
        p, y = torch.cat(self.p), torch.cat(self.y)
        history.append({"seconds": self.spent, "balanced_accuracy": float(balanced_accuracy_score(y, p.argmax(1))),
            "auroc": float(roc_auc_score(y, p[:, 1]))})
        print(f"fastai, epoch {len(history)}: {history[-1]}", file=sys.stderr, flush=True)
split = lambda m: [params(m[0]), params(m[1])]
learner = Learner(dls, model, loss_func=CrossEntropyLossFlat(), splitter=split, cbs=[Measure()])
setup = time.perf_counter() - start
learner.fit_one_cycle(task["epochs"], slice(1e-4, 1e-3))
print(json.dumps({"setup": setup, "epochs": history}))
"""

FOVEAL = """
import json, sys, time
task = json.load(open(sys.argv[1]))
start = time.perf_counter()
import foveal
rows = foveal.compare(task["data"], methods=sys.argv[2], seed=task["seed"], out=sys.argv[3], offline=True).to_dict()
print(json.dumps({"seconds": time.perf_counter() - start, "rows": [r for r in rows if r["trained_params"]]}))
"""


def lay_out(folder: Path) -> Path:
    """Images, split and weights as files that both programs read."""
    from safetensors.torch import save_file

    from foveal.verbs._prepare import prepare

    prepared = prepare(DATA, "tf_efficientnet_lite0", offline=True)
    splits, data = prepared.splits(SEED), prepared.dataset
    paths: list[str] = []
    for index in range(len(data)):
        file = folder / "images" / f"{index:05d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data.read(index))
        paths.append(str(file))
    save_file(prepared.backbone.model.state_dict(), folder / "backbone.safetensors")
    task = {
        "data": DATA, "seed": SEED, "epochs": EPOCHS, "arch": prepared.backbone.arch,
        "weights": str(folder / "backbone.safetensors"), "paths": paths, "classes": list(data.classes),
        "labels": [data.classes[label] for label in data.labels], "splits": splits.tolist(),
    }  # fmt: skip
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    return path


def measured(python: str, code: str, *arguments: str, cache: Path | None = None) -> dict[str, Any]:
    import os

    environment = {**os.environ, **({"FOVEAL_CACHE": str(cache)} if cache else {})}
    start = time.perf_counter()
    done = subprocess.run(
        [python, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - start}


def versus(python: str, folder: Path) -> str:
    """The table as Markdown."""
    place = folder / "fastai"
    place.mkdir()
    task = lay_out(place)
    frozen = measured(sys.executable, FOVEAL, str(task), "frozen", str(place / "frozen"), cache=place / "cache")
    theirs = measured(python, FASTAI, str(task))
    best = max(frozen["rows"], key=lambda row: row["balanced_accuracy"])
    last = theirs["epochs"][-1]
    lines = [
        "| program | what | seconds | balanced accuracy | AUROC |",
        "|---|---|---|---|---|",
        *[
            f"| fastai | fine-tuning, epoch {number} | {theirs['setup'] + epoch['seconds']:.0f} "
            f"| {epoch['balanced_accuracy']:.3f} | {epoch['auroc']:.3f} |"
            for number, epoch in enumerate(theirs["epochs"], start=1)
        ],
        *[
            f"| foveal | {row['method']}, frozen, cold cache, all methods in one `compare` | {frozen['wall']:.0f} "
            f"| {row['balanced_accuracy']:.3f} | {row['auroc']:.3f} |"
            for row in sorted(frozen["rows"], key=lambda row: -row["balanced_accuracy"])
        ],
        "",
        f"fastai reaches {last['balanced_accuracy']:.3f} after {EPOCHS} epochs and "
        f"{theirs['setup'] + last['seconds']:.0f} s. `foveal compare` of all frozen-feature methods takes "
        f"{frozen['wall']:.0f} s, **{(theirs['setup'] + last['seconds']) / frozen['wall']:.0f} times less**, and its "
        f"best method ({best['method']}) has {best['balanced_accuracy']:.3f}: "
        f"{best['balanced_accuracy'] - last['balanced_accuracy']:+.3f}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(versus(sys.argv[1], Path(name)))
