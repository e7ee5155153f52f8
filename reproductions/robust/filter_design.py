"""Banks learnt without labels as a first layer, on digits and solar cells, and EfficientNet-Lite0's own first layer.

A convolution of 48 filters of 7 x 7 on grey images, its ReLU summed over each quarter of the map, and logistic
regression on that, its strength chosen by held-out log-loss: mean accuracy over three folds, on 1,740 digits at 16
pixels and 600 solar cells at 64, half of them defective. Banks are learnt from 20,000 normalised patches of the
training folds, `kmeans` on whitened ones. `random` is what a network begins with; `random_whitened` says whether it is
the whitening or the learning that helps.

Lite0's first layer is compared with Gaussian weights of its shape, drawn once per seed.
"""

import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from foveal.backbones.adapter import load_backbone
from foveal.blocks.filter_banks import Kind, install, learn, quadrants
from foveal.blocks.filters import effective_rank, spectrum
from foveal.blocks.logistic import stratified_folds
from foveal.core.seeds import generator
from foveal.data.open import open_dataset
from foveal.methods.adapt.linear import Linear

FILTERS, KERNEL, PATCHES, FOLDS = 48, 7, 20_000, 3
BANKS: dict[str, tuple[Kind, bool]] = {
    "random": ("random", False),
    "random_whitened": ("random", True),
    "pca": ("pca", False),
    "kmeans_unwhitened": ("kmeans", False),
    "kmeans": ("kmeans", True),
}
"""Name -> kind, and whether patches are whitened."""


def grey(name: str, count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [n, 1, size, size] in [0, 1] of a sample, as many of each class, and their labels."""
    dataset = open_dataset(f"sample:{name}")
    rng = generator(seed, "images", name)
    per_class = count // len(dataset.classes)
    rows = np.concatenate(
        [rng.permutation(np.flatnonzero(dataset.labels == c))[:per_class] for c in range(len(dataset.classes))]
    )
    pixels = [dataset.image(int(row)).convert("L").resize((size, size), Image.Resampling.BICUBIC) for row in rows]
    images = torch.from_numpy(np.stack([np.asarray(each) for each in pixels])).float()[:, None] / 255
    return images, torch.from_numpy(dataset.labels[rows])


def probed(images: Tensor, labels: Tensor, kind: Kind, whiten: bool, filters: int, patches: int, seed: int) -> float:
    """Mean accuracy over the folds of a linear classifier on one frozen layer."""
    right: list[float] = []
    fold = stratified_folds(labels, FOLDS, seed)
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        bank = learn(images[train], kind, filters, KERNEL, whiten=whiten, count=patches, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # patches are not normalised one by one when it is used
            conv = install(nn.Conv2d(1, filters, KERNEL), bank)
        X, held_out = quadrants(images[train], conv), quadrants(images[test], conv)
        head = Linear().fit_features(X, labels[train], torch.ones(len(X)), seed)
        with torch.no_grad():
            right.append(float((head(held_out).argmax(1) == labels[test]).float().mean()))
    return sum(right) / len(right)


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    filters, patches = (8, 2000) if tiny else (FILTERS, PATCHES)
    values: dict[str, float] = {}
    for name, count, size in (("digits", 60 if tiny else 1740, 16), ("elpv", 24 if tiny else 600, 64)):
        images, labels = grey(name, count, size, seed)
        for bank, (kind, whiten) in BANKS.items():
            values[f"{name}.{bank}"] = probed(images, labels, kind, whiten, filters, patches, seed)
    net = load_backbone("test_efficientnet" if tiny else "tf_efficientnet_lite0", pretrained=not tiny)
    first = next(each for each in net.modules() if isinstance(each, nn.Conv2d)).weight.detach()
    drawn = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
    for name, weight in (("lite0", first), ("random", drawn)):
        values[f"{name}.effective_rank"] = effective_rank(weight)
        values[f"{name}.oriented"] = spectrum(weight).oriented()
    return values
