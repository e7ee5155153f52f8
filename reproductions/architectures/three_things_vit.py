"""A ViT of 12 small blocks (width 64) on woven fabric of three kinds at 64 pixels, and the three things done to it.

From the same random weights, 200 images of each class and 15 epochs: the blocks in a row (12x1), two by two (6x2), and
in a row behind an hMLP stem. The trained 12x1 is then made parallel and trained for another 5 epochs, and adapted to
defects of solar cells by its attention alone or its MLPs alone (200 cells of each kind, 10 epochs). And the time of one
image of 224 pixels through vit_tiny_patch16_224 in ONNX Runtime: in a row, parallel as timm computes it, and with its
branches merged, timed in turns.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from foveal.architectures.three_things_vit import HMlpStem, merge_branches, parallelize
from foveal.backbones.adapter import Backbone, load_backbone
from foveal.blocks.tuning import SteadyClassifier, zero_linear
from foveal.core.method import Classifier
from foveal.core.seeds import generator, seed_everything
from foveal.core.threads import cpu_threads
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.methods.adapt.attention_only import AttentionOnly, Options, ffn_only
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.ship.beside import Exporter
from foveal.ship.variants import time_in_turns
from foveal.train.small import few_and_rest, measure, shrunk, small_net

SIZE = 64


class FfnOnly(AttentionOnly):
    """The mirror image."""

    def attach(self, backbone: Any, classes: int) -> Classifier:
        ffn_only(backbone)
        return SteadyClassifier(backbone, zero_linear(backbone.width, classes))


def drawn(dataset: Dataset, seed: int, train: int, test: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Images at 64 pixels, and which of them to train and to test on."""
    rows, rest = few_and_rest(dataset.labels, train, seed)
    rest = np.sort(generator(seed, "tested").permutation(rest)[:test])
    chosen = shrunk(dataset, np.concatenate([rows, rest]), SIZE)
    return chosen, np.arange(len(rows)), np.arange(len(rows), len(chosen))


def times(tiny: bool) -> dict[str, float]:
    """Milliseconds of one image."""
    seed_everything(0)
    arch, size = ("test_vit", 64) if tiny else ("vit_tiny_patch16_224", 224)
    backbone = load_backbone(arch, pretrained=False, size=size)
    parallel = parallelize(backbone.model)
    nets = {"sequential": backbone.model, "parallel": parallel, "merged": merge_branches(parallel)}
    head = nn.Linear(backbone.width, 2)
    image = Image.fromarray(generator(0, "pixels").integers(0, 256, (size, size, 3), dtype=np.uint8))
    exporter = Exporter(backbone.preprocessing, ("a", "b"), "single-label", [image], cpu_threads())
    with tempfile.TemporaryDirectory() as folder:
        opened = {
            name: exporter.runtime(Classifier(Backbone(backbone.plan, net), head).eval(), Path(folder) / f"{name}.onnx")
            for name, net in nets.items()
        }
        timed = time_in_turns(opened, np.asarray(image)[None], batches=(1,), seconds=0.1 if tiny else 6.0)
    return {f"{name}.milliseconds": rows[0]["milliseconds"] for name, rows in timed.items()}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    depth = 2 if tiny else 12
    shape = {"img_size": SIZE, "embed_dim": 32 if tiny else 64, "num_heads": 2}
    sequential = small_net("vit_tiny_patch16_224", seed, size=SIZE, depth=depth, **shape)
    parallel = small_net(
        "vit_tiny_patch16_224", seed, size=SIZE, depth=depth // 2, block_fn=ParallelThingsBlock, **shape
    )
    parallel.model.load_state_dict(parallelize(sequential.model).state_dict())
    stem = small_net("vit_tiny_patch16_224", seed, size=SIZE, depth=depth, embed_layer=HMlpStem, **shape)
    fabric = drawn(open_dataset("sample:textile"), seed, 8 if tiny else 200, 20 if tiny else 600)
    scratch = Full(FullOptions(epochs=1 if tiny else 15, lr=1e-3, head_lr_multiplier=1.0))
    outcomes = {
        name: measure(scratch, net, *fabric, seed)
        for name, net in {"sequential": sequential, "parallel": parallel, "hmlp": stem}.items()
    }
    trained: Any = outcomes["sequential"].model.backbone
    turned = Backbone(parallel.plan, parallelize(trained.model))
    further = Full(FullOptions(epochs=1 if tiny else 5, lr=3e-4, head_lr_multiplier=1.0))
    outcomes["parallelized"] = measure(further, turned, *fabric, seed)

    cells = drawn(open_dataset("sample:elpv"), seed, 6 if tiny else 200, 20 if tiny else 600)
    given = Options(epochs=1 if tiny else 10, lr=5e-4, head_lr_multiplier=4.0)
    for name, method in {"attention_only": AttentionOnly(given), "ffn_only": FfnOnly(given)}.items():
        outcomes[name] = measure(method, trained, *cells, seed)

    values: dict[str, float] = {}
    for name, outcome in outcomes.items():
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.params"] = outcome.trained_params
    logits = outcomes["sequential"].model.head
    with torch.no_grad():
        untuned = Classifier(Backbone(parallel.plan, parallelize(trained.model)).eval(), logits).eval()
        values["gap_before_tuning"] = relative_gap(outcomes["sequential"].model.eval(), untuned)
    return {**values, **times(tiny)}


def relative_gap(model: Classifier, other: Classifier) -> float:
    """How far another model's logits are from a model's on random pixels, as a share of their size."""
    x = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    right = model(x)
    return float((other(x) - right).norm() / right.norm())
