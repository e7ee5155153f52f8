"""UDML-SS on digits: a small CNN taught the digits 0 to 4 learns an embedding of the digits 5 to 9 from images without
labels; Recall@1 on other images of them, beside the CNN as it was and the same training without the rotation.

The images learnt from carry labels that mean nothing.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from foveal.backbones.adapter import Backbone, build, normalise
from foveal.core.families.retrieve import Embedding
from foveal.core.seeds import derive, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.evaluate.embedding import cluster_nmi, retrieval
from foveal.methods.adapt.full import Full
from foveal.methods.adapt.full import Options as FullOptions
from foveal.methods.retrieve.udml_ss import Options, UdmlSs
from foveal.train.loop import train
from foveal.train.pool import PoolImages
from foveal.train.small import few_and_rest, measure, only, small_net

SIZE = 32


def vectors(model: nn.Module, dataset: Dataset, backbone: Backbone) -> np.ndarray:
    pixels = np.stack([to_pixels(dataset.image(row), backbone.preprocessing) for row in range(len(dataset))])
    with torch.no_grad():
        return model.eval()(normalise(torch.from_numpy(pixels), backbone.preprocessing)).numpy()


def embedded(method: UdmlSs, backbone: Backbone, pool: Dataset, seed: int) -> Embedding:
    """The method's embedding of a pool, from a copy of the backbone."""
    own = Backbone(backbone.plan, build(backbone.plan))
    own.load_state_dict(backbone.state_dict())
    seed_everything(derive(seed, "head"))
    model = method.attach(own, len(pool))
    feed = PoolImages(pool, model, method, own.preprocessing, method.recipe())
    with tempfile.TemporaryDirectory() as work:
        return train(method, model, feed, seed, recipe=method.recipe(), device="cpu", work=Path(work)).model


def scores(name: str, X: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    found = retrieval(X, labels, (1, 8))
    return {
        f"{name}.recall_1": found.recall[1],
        f"{name}.recall_8": found.recall[8],
        f"{name}.map_at_r": found.map_at_r,
        f"{name}.nmi": cluster_nmi(X, labels),
    }


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    digits = open_dataset("sample:digits")
    first, second = only(digits, "01234"), only(digits, "56789")
    teacher = Full(FullOptions(epochs=1 if tiny else 8, lr=2e-3, head_lr_multiplier=1.0, augment="none"))
    net = small_net("test_resnet", seed, size=SIZE)
    taught = measure(teacher, net, first, *few_and_rest(first.labels, 8 if tiny else 150, seed), seed)
    backbone = taught.model.backbone
    assert isinstance(backbone, Backbone)
    rows, rest = few_and_rest(second.labels, 8 if tiny else 100, seed)
    pool = replace(second.subset(rows), labels=np.arange(len(rows)) % 5)
    test = second.subset(rest[::20] if tiny else rest)
    chosen = Options(
        clusters=8 if tiny else 20, width=128, epochs=1 if tiny else 20, every=4, batch_size=20 if tiny else 80, lr=3e-4
    )
    values = scores("untouched", vectors(backbone, test, backbone), test.labels)
    for name, options in (("udml-ss", chosen), ("without-rotation", replace(chosen, eta=0.0))):
        embedding = embedded(UdmlSs(options), backbone, pool, seed)
        values |= scores(name, vectors(embedding, test, backbone), test.labels)
    return values
