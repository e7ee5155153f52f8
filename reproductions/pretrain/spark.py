"""SparK on photos of solar cells at 96 pixels, labels unread: a small ResNet from random weights, with the decoder
reading four scales or the deepest alone, and EfficientNet-Lite0 trained further from its ImageNet weights.

The loss is of cells that were not trained on, under the same masks for all. Features are judged by the AUC of a linear
probe for defects, fitted on the cells trained on and measured on the others, beside the same network untouched.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, build, load_backbone, normalise
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.evaluate.metrics import auroc
from foveal.methods.adapt.linear import Linear
from foveal.methods.pretrain.spark import MaskedAutoencoder, Options, Spark
from foveal.train.loop import train
from foveal.train.small import shrunk, small_net
from foveal.train.views import ViewFeed

SIZE, POOL, TEST = 96, 320, 480
SMALL = {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}


def features(backbone: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([backbone.eval()(part) for part in images.split(64)])


def probe(backbone: Backbone, images: Tensor, labels: np.ndarray, pool: int) -> float:
    """AUC for defects of a linear probe, fitted on the first `pool` images and measured on the others."""
    X, y = features(backbone, images), torch.from_numpy(labels)
    head = Linear().fit_features(X[:pool], y[:pool], torch.ones(pool), seed=0)
    with torch.no_grad():
        chance = head(X[pool:]).softmax(1)[:, 1]
    return auroc(chance.numpy(), labels[pool:])


def held_out(method: Spark, model: MaskedAutoencoder, images: Tensor, seed: int) -> tuple[float, float]:
    """Loss on images not trained on, and that of predicting zero."""
    torch.manual_seed(derive(seed, "masks"))
    with torch.no_grad():
        found = [method.loss(model.eval(), {"views": part[:, None]}) for part in images.split(64)]
    loss, blank = (float(np.mean([float(each[name]) for each in found])) for name in ("loss", "blank"))
    return loss, blank


def pretrained(method: Spark, backbone: Backbone, pool: Dataset, seed: int) -> MaskedAutoencoder:
    """What a copy of a backbone becomes on the CPU."""
    own = Backbone(backbone.plan, build(backbone.plan))
    own.load_state_dict(backbone.state_dict())
    seed_everything(derive(seed, "init"))
    model = method.attach(own)
    feed = ViewFeed(pool, own.preprocessing, method.views(), "elpv")
    with tempfile.TemporaryDirectory() as work:
        train(method, model, feed, seed, recipe=method.recipe(), device="cpu", work=Path(work))
    return model


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    pool, test, size = (16, 16, 64) if tiny else (POOL, TEST, SIZE)
    cells = open_dataset("sample:elpv")
    rows = generator(seed, "cells").permutation(len(cells))[: pool + test]
    cells = shrunk(cells, rows, size)
    small = small_net("resnet18", seed, size=size, **SMALL)
    lite = load_backbone("tf_efficientnet_lite0", offline=True, size=size)
    defective = (cells.labels == cells.classes.index("defective")).astype(np.int64)
    values: dict[str, float] = {}
    plans = {
        "resnet": (small, Options(epochs=6, batch_size=16, lr=2e-3, decoder_width=64)),
        "resnet.deepest": (small, Options(epochs=6, batch_size=16, lr=2e-3, decoder_width=64, scales=1)),
        "lite0": (lite, Options(epochs=4, batch_size=16, lr=3e-4, decoder_width=64)),
    }
    for name, (backbone, options) in plans.items():
        method = Spark(Options(epochs=1, batch_size=8, decoder_width=32, scales=options.scales) if tiny else options)
        p = backbone.preprocessing
        pixels = np.stack([to_pixels(cells.image(row), p) for row in range(len(cells))])
        images = normalise(torch.from_numpy(pixels), p)
        model = pretrained(method, backbone, cells.subset(np.arange(pool)), seed)
        values[f"{name}.loss"], values[f"{name}.blank"] = held_out(method, model, images[pool:], seed)
        if name != "resnet.deepest":
            values[f"{name}.untouched_auc"] = probe(backbone, images, defective, pool)
        values[f"{name}.auc"] = probe(model.backbone, images, defective, pool)
    return values
