"""A ViT of 12 small blocks (width 48, 17 tokens, mean-pooled) on digits at 32 pixels, and the three things done to it.

From the same random weights, 100 images of each digit and 24 epochs: the blocks in a row (12x1), two by two (6x2),
and in a row behind an hMLP stem. The trained 12x1 is then made parallel and trained for another 4 epochs, and adapted
to defects of solar cells by its attention alone or its MLPs alone (200 cells of each kind, 8 epochs). And the time of
one image in ONNX Runtime, in a row, parallel as timm computes it, and with its branches merged, timed in turns: through
vit_tiny_patch16_224 at 224 pixels, and (`few_tokens`) through the 12x1 itself. A first world, woven fabric at 64
pixels, left all nets near chance and was replaced, with the same checks.
"""

import tempfile
from functools import partial
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

SIZE = 32
SMALL = {"img_size": SIZE, "patch_size": 8, "num_heads": 2, "global_pool": "avg"}
EPOCHS, LR = 24, 2e-3


class FfnOnly(AttentionOnly):
    """The mirror image."""

    def attach(self, backbone: Any, classes: int) -> Classifier:
        ffn_only(backbone)
        return SteadyClassifier(backbone, zero_linear(backbone.width, classes))


def drawn(dataset: Dataset, seed: int, train: int, test: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Images at 32 pixels, and which of them to train and to test on."""
    rows, rest = few_and_rest(dataset.labels, train, seed)
    rest = np.sort(generator(seed, "tested").permutation(rest)[:test])
    chosen = shrunk(dataset, np.concatenate([rows, rest]), SIZE)
    return chosen, np.arange(len(rows)), np.arange(len(rows), len(chosen))


def times(backbone: Backbone, seconds: float, prefix: str = "") -> dict[str, float]:
    """Milliseconds of one image through a sequential ViT, as it is and in the two parallel forms."""
    size = backbone.preprocessing.size
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
        timed = time_in_turns(opened, np.asarray(image)[None], batches=(1,), seconds=seconds)
    return {f"{prefix}{name}.milliseconds": rows[0]["milliseconds"] for name, rows in timed.items()}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    depth = 2 if tiny else 12
    shape = {**SMALL, "embed_dim": 32 if tiny else 48}
    sequential = small_net("vit_tiny_patch16_224", seed, size=SIZE, depth=depth, **shape)
    parallel = small_net(
        "vit_tiny_patch16_224", seed, size=SIZE, depth=depth // 2, block_fn=ParallelThingsBlock, **shape
    )
    parallel.model.load_state_dict(parallelize(sequential.model).state_dict())
    stem = partial(HMlpStem, factors=(2, 2, 2))
    hmlp = small_net("vit_tiny_patch16_224", seed, size=SIZE, depth=depth, embed_layer=stem, **shape)
    digits = drawn(open_dataset("sample:digits"), seed, 4 if tiny else 100, 20 if tiny else 600)
    recipe: dict[str, Any] = {"head_lr_multiplier": 1.0, "augment": "none"}
    scratch = Full(FullOptions(epochs=1 if tiny else EPOCHS, lr=LR, **recipe))
    outcomes = {
        name: measure(scratch, net, *digits, seed)
        for name, net in {"sequential": sequential, "parallel": parallel, "hmlp": hmlp}.items()
    }
    trained: Any = outcomes["sequential"].model.backbone
    turned = Backbone(parallel.plan, parallelize(trained.model))
    further = Full(FullOptions(epochs=1 if tiny else 4, lr=LR / 3, **recipe))
    outcomes["parallelized"] = measure(further, turned, *digits, seed)

    cells = drawn(open_dataset("sample:elpv"), seed, 6 if tiny else 200, 20 if tiny else 600)
    given: dict[str, Any] = {"epochs": 1 if tiny else 8, "lr": 5e-4, "head_lr_multiplier": 4.0}
    for name, method in {
        "attention_only": AttentionOnly(Options(**given)),
        "ffn_only": FfnOnly(Options(**given)),
    }.items():
        outcomes[name] = measure(method, trained, *cells, seed)

    values: dict[str, float] = {}
    for name, outcome in outcomes.items():
        values[f"{name}.balanced_accuracy"] = outcome.balanced_accuracy
        values[f"{name}.params"] = outcome.trained_params
    head = outcomes["sequential"].model.head
    untuned = Classifier(Backbone(parallel.plan, parallelize(trained.model)), head).eval()
    values["gap_before_tuning"] = relative_gap(outcomes["sequential"].model.eval(), untuned)
    seed_everything(0)
    arch, size = ("test_vit", 64) if tiny else ("vit_tiny_patch16_224", 224)
    full = load_backbone(arch, pretrained=False, size=size)
    values |= times(full, 0.1 if tiny else 4.0)
    return {**values, **times(sequential, 0.1 if tiny else 1.0, "few_tokens_")}


@torch.no_grad()
def relative_gap(model: Classifier, other: Classifier) -> float:
    """How far another model's logits are from a model's on random pixels, as a share of their size."""
    x = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    right = model(x)
    return float((other(x) - right).norm() / right.norm())
