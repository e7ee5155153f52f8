"""Filter banks without labels, and putting one into a convolution.

Patches x of c x p x p numbers are made comparable and decorrelated,

    x' = (x - mean x) / sqrt(var x + (10/255)^2),    z = Z (x' - m),    Z = V diag(l + eps mean l)^-1/2 V^T,

with m, l, V the mean and the eigenvalues and vectors of the covariance of x' (ZCA), and a bank is a matrix D [n, d] of
filters on z: `kmeans` (spherical; Coates and Ng, 2012), `pca`, `ica`, `autoencoder` (tied weights, L1), `som` (Kohonen,
1982), or, without patches, `gabor`, `dct` and `random`. All rows have unit norm.

    bank = learn(images, "kmeans", filters=64, size=7)
    conv = install(nn.Conv2d(3, 64, 7, stride=2), bank)   # conv(images) is D Z of every patch
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks.dictionaries import (
    autoencoder_filters,
    covariance,
    dct_filters,
    gabor_filters,
    ica_filters,
    kmeans_filters,
    pca_filters,
    random_filters,
    som_filters,
)
from foveal.core.errors import BackboneError, DataError, UsageError

Kind = Literal["kmeans", "pca", "ica", "autoencoder", "som", "gabor", "dct", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DRAWN = ("gabor", "dct", "random")
"""Banks that no image is needed for."""
CONTRAST = (10 / 255) ** 2


@dataclass(frozen=True)
class Whitening:
    """x -> matrix (x - mean): `matrix` [d, d] is symmetric, `mean` [d]."""

    matrix: Tensor
    mean: Tensor

    def __call__(self, patches: Tensor) -> Tensor:
        """Patches [n, d] -> whitened [n, d]."""
        return (patches - self.mean) @ self.matrix


@dataclass(frozen=True)
class Bank:
    """Filters that read patches of `shape` (c, p, p).

    Attributes:
        filters: D [n, d], on whitened patches if there is a `whitening`, else on patches as they are.
        contrast: mean over patches of 1 / sqrt(var x + CONTRAST), if every patch was divided by its own; 0 if none was.
    """

    kind: Kind
    filters: Tensor
    shape: tuple[int, int, int]
    whitening: Whitening | None = None
    contrast: float = 0.0

    def pictures(self) -> Tensor:
        """The filters as [n, c, p, p]."""
        return self.filters.reshape(-1, *self.shape)


def patches(images: Tensor, size: int, count: int = 50_000, seed: int = 0) -> Tensor:
    """Patches [count, c * size * size] from places drawn by seed, all images [B, c, H, W] alike; the same place may be
    drawn twice, and never more patches than there are places.

    Raises:
        DataError: images smaller than a patch, or all of them constant.
    """
    images = images.detach().float()
    number, _, height, width = images.shape
    if min(height, width) < size:
        raise DataError(f"images of {height} x {width} are smaller than a patch of {size} x {size}: give larger ones")
    if float(images.flatten(2).var(2, correction=0).max()) < 1e-12:
        raise DataError(f"all {number} images are constant: zero variance, there is nothing to learn filters from")
    down, across = height - size + 1, width - size + 1
    count = min(count, number * down * across)
    rng = torch.Generator().manual_seed(seed)
    which, top, left = (torch.randint(high, (count,), generator=rng) for high in (number, down, across))
    steps = torch.arange(size)
    rows, columns = top[:, None, None] + steps[:, None], left[:, None, None] + steps
    return images.permute(0, 2, 3, 1)[which[:, None, None], rows, columns].permute(0, 3, 1, 2).reshape(count, -1)


def normalised(x: Tensor) -> Tensor:
    """Patches [n, d] with their own mean taken off, over their own deviation."""
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + CONTRAST).sqrt()


def zca(x: Tensor, eps: float = 0.1) -> Whitening:
    """V diag(l + eps mean l)^-1/2 V^T and the mean, of patches [n, d].

    In units of the mean variance, eps means the same on patches of any scale; that of normalised ones is near 1.
    """
    mean, found = covariance(x)
    values, vectors = torch.linalg.eigh(found)
    matrix = (vectors * (values.clamp_min(0) + eps * values.mean()).rsqrt()) @ vectors.T
    return Whitening(matrix.float(), mean.float())


MAKERS: dict[Kind, Callable[[Tensor, int, tuple[int, int, int], int], Tensor]] = {
    "kmeans": lambda x, n, shape, seed: kmeans_filters(x, n, seed),
    "pca": lambda x, n, shape, seed: pca_filters(x, n),
    "ica": lambda x, n, shape, seed: ica_filters(x, n, seed),
    "autoencoder": lambda x, n, shape, seed: autoencoder_filters(x, n, seed),
    "som": lambda x, n, shape, seed: som_filters(x, n, seed),
    "gabor": lambda x, n, shape, seed: gabor_filters(n, shape),
    "dct": lambda x, n, shape, seed: dct_filters(n, shape),
    "random": lambda x, n, shape, seed: random_filters(n, shape, seed),
}
"""Patches, number of filters, (c, p, p) and seed -> filters [n, d]."""


def learn(
    images: Tensor,
    kind: Kind = "kmeans",
    filters: int = 64,
    size: int = 7,
    *,
    eps: float = 0.1,
    whiten: bool | None = None,
    contrast: bool = True,
    count: int = 50_000,
    seed: int = 0,
) -> Bank:
    """A bank of `filters` filters of size x size from images [B, c, H, W]; labels are not asked for.

    Args:
        eps: what is added to the variances when whitening, as a share of their mean.
        whiten: None: for all kinds that learn but pca, which is the whitening's own directions.
        contrast: whether every patch loses its mean and is divided by its deviation before.
        count: patches looked at.

    Raises:
        UsageError: a kind that is none, or more filters than it can make.
        DataError: too few patches, more centroids than patches, or images without variation.
    """
    if kind not in KINDS:
        raise UsageError(f"no bank '{kind}': expected one of {', '.join(KINDS)}")
    if filters < 1 or size < 1:
        raise UsageError(f"{filters} filters of {size} x {size}: expected at least 1 of at least 1 x 1")
    shape = (images.shape[1], size, size)
    made = MAKERS[kind]
    if kind in DRAWN and not whiten:
        return Bank(kind, made(images, filters, shape, seed), shape)
    raw = patches(images, size, count, seed)
    x = normalised(raw) if contrast else raw
    scale = float((raw.var(1, correction=0) + CONTRAST).rsqrt().mean()) if contrast else 0.0
    whitening = zca(x, eps) if (kind != "pca" if whiten is None else whiten) else None
    x = whitening(x) if whitening else x
    return Bank(kind, made(x, filters, shape, seed), shape, whitening, scale)


def folded(bank: Bank) -> tuple[Tensor, Tensor]:
    """Weight [n, c, p, p] and bias [n] that give D Z (x - m) on plain patches.

    Of the normalisation of each patch, taking off its mean is folded in too; its division becomes one by the patches'
    mean deviation.
    """
    weight = bank.filters.double()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if bank.whitening is not None:
        weight = weight @ bank.whitening.matrix.double()
        bias = -weight @ bank.whitening.mean.double()
    if bank.contrast:
        weight = bank.contrast * (weight - weight.mean(1, keepdim=True))
    return weight.float().reshape(-1, *bank.shape), bias.float()


def install(conv: nn.Conv2d, bank: Bank, fold_zca: bool = True) -> nn.Conv2d:
    """A copy of a convolution (stride, padding, dilation kept) with the filters of a bank as its weight, and a bias.

    Args:
        fold_zca: fold whitening and mean in, so that plain images can be given; else the filters alone, for images
            that are whitened before. A bank of normalised patches warns: a division by each patch's own deviation is no
            convolution.

    Raises:
        BackboneError: no plain convolution, or of another kernel, depth or number than the bank's.
    """
    if not isinstance(conv, nn.Conv2d):
        raise BackboneError(f"a bank goes into an nn.Conv2d, not into {type(conv).__name__}")
    if conv.groups != 1:
        raise BackboneError(
            f"this convolution has {conv.groups} groups: a bank reads all channels, give one of 1 group"
        )
    wanted, held = (conv.out_channels, conv.in_channels, *conv.kernel_size), (len(bank.filters), *bank.shape)
    if wanted != held:
        raise BackboneError(
            f"the convolution is {' x '.join(map(str, wanted))} (filters, channels, rows, columns), the bank "
            f"{' x '.join(map(str, held))}: learn the bank with filters={wanted[0]}, size={wanted[2]} on images of "
            f"{wanted[1]} channels"
        )
    if bank.contrast and fold_zca:
        warnings.warn(
            "the bank was learnt on patches divided by their own deviation, which no convolution can do: it divides by "
            "their mean deviation; learn(..., contrast=False) folds exactly",
            stacklevel=2,
        )
    weight, bias = folded(bank) if fold_zca else (bank.pictures(), torch.zeros(len(bank.filters)))
    made = copy.deepcopy(conv)
    made.weight, made.bias = (nn.Parameter(each.to(conv.weight)) for each in (weight, bias))
    return made


@torch.no_grad()
def quadrants(images: Tensor, conv: nn.Conv2d, batch: int = 64) -> Tensor:
    """What a linear classifier on one layer reads: ReLU of the convolution, summed over each quarter of the map.

    Images [B, c, H, W] -> features [B, 4 n].
    """
    found: list[Tensor] = []
    for part in images.split(batch):
        maps = conv(part).relu()
        area = maps.shape[-2] * maps.shape[-1] / 4
        found.append(F.adaptive_avg_pool2d(maps, 2).flatten(1) * area)
    return torch.cat(found)
