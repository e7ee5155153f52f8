"""Dictionaries of patches: n directions of unit norm [n, d], learnt from patches [m, d] without labels, or drawn.

`foveal.blocks.filter_banks` makes the patches, whitens them, and puts what comes out into a convolution.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.core.errors import DataError, UsageError

CHUNK = 8192
ICA_ROWS = 20_000
PER_DIMENSION = 5
"""Patches that a covariance needs, for each number of a patch."""


def covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of patches [n, d], in float64.

    Raises:
        DataError: fewer than PER_DIMENSION patches for each of the d numbers, or no variance.
    """
    needed = PER_DIMENSION * x.shape[1]
    if len(x) < needed:
        raise DataError(
            f"{len(x)} patches of {x.shape[1]} numbers: a covariance needs at least {needed} ({PER_DIMENSION} for each "
            "number); give more or larger images, or smaller patches"
        )
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    found = centred.T @ centred / len(x)
    if float(found.diagonal().max()) < 1e-12:
        raise DataError(f"all {len(x)} patches are alike: zero variance, there is nothing to learn filters from")
    return mean, found


def unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def pca_filters(x: Tensor, n: int) -> Tensor:
    """The n directions [n, d] of most variance, orthonormal."""
    check_directions(n, x.shape[1], "pca")
    return torch.linalg.eigh(covariance(x)[1])[1].T.flip(0)[:n].float()


def kmeans_filters(x: Tensor, n: int, seed: int = 0, iterations: int = 20) -> Tensor:
    """Damped spherical k-means: each patch goes, with its sign, to the centroid of largest |D x|; the sum of what came
    and the centroid before, at unit norm, is the next. A centroid that nothing came to is drawn anew from the patches.

    Raises:
        DataError: more centroids than patches.
    """
    if n > len(x):
        raise DataError(f"{n} centroids from {len(x)} patches: expected at most as many as patches; give more images")
    rng = torch.Generator().manual_seed(seed)
    centroids = unit_rows(torch.randn(n, x.shape[1], generator=rng))
    for _ in range(iterations):
        gathered = torch.zeros_like(centroids)
        came = torch.zeros(n, dtype=torch.bool)
        for part in x.split(CHUNK):
            scores = part @ centroids.T
            best = scores.abs().argmax(1)
            gathered.index_add_(0, best, part * scores.gather(1, best[:, None]))
            came[best] = True
        centroids = unit_rows(centroids + gathered)
        lost = torch.nonzero(~came)[:, 0]
        centroids[lost] = unit_rows(x[torch.randint(len(x), (len(lost),), generator=rng)])
    return centroids


def ica_filters(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """Directions [n, d] along which patches are least Gaussian (FastICA, log cosh)."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    check_directions(n, x.shape[1], "ica")
    x = x[:ICA_ROWS].double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = FastICA(n, whiten="unit-variance", max_iter=200, tol=1e-3, random_state=seed).fit(x.numpy())
    return unit_rows(torch.from_numpy(fitted.components_).float())


def autoencoder_filters(
    x: Tensor, n: int, seed: int = 0, *, steps: int = 400, batch: int = 512, sparsity: float = 0.1
) -> Tensor:
    """Minimises mean |x - W^T W x|^2 / d + sparsity * mean |W x|, by Adam from random directions."""
    rng = torch.Generator().manual_seed(seed)
    weight = unit_rows(torch.randn(n, x.shape[1], generator=rng)).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            drawn = x[torch.randint(len(x), (batch,), generator=rng)]
            codes = drawn @ weight.T
            loss = F.mse_loss(codes @ weight, drawn) + sparsity * codes.abs().mean()
            (weight.grad,) = torch.autograd.grad(loss, weight)
            optimiser.step()
    return unit_rows(weight.detach())


def som_filters(x: Tensor, n: int, seed: int = 0, *, epochs: int = 20) -> Tensor:
    """A self-organising map in its batch form: units on a grid as square as n allows, each the mean of the patches
    weighted by exp(-r^2 / 2 s^2) in the grid distance r to their best unit; s falls from half the grid to 0.5."""
    rows = max(divisor for divisor in range(1, math.isqrt(n) + 1) if n % divisor == 0)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(n // rows)).float()
    apart = torch.cdist(place, place).square()
    rng = torch.Generator().manual_seed(seed)
    if n > len(x):
        raise DataError(f"a map of {n} units from {len(x)} patches: expected at most as many; give more images")
    units = x[torch.randperm(len(x), generator=rng)[:n]].clone()
    first = max(max(rows, n // rows) / 2, 0.5)
    for epoch in range(epochs):
        width = first * (0.5 / first) ** (epoch / max(1, epochs - 1))
        total, came = torch.zeros_like(units), torch.zeros(n)
        for part in x.split(CHUNK):
            best = (part @ units.T - units.square().sum(1) / 2).argmax(1)
            total.index_add_(0, best, part)
            came += torch.bincount(best, minlength=n)
        near = torch.exp(-apart / (2 * width**2))
        units = (near @ total) / (near @ came).clamp_min(1e-12)[:, None]
    return unit_rows(units)


def gabor_filters(n: int, shape: tuple[int, int, int]) -> Tensor:
    """Waves under a Gaussian, in 8 directions, at 0 and 90 degrees of phase, their length from 2.5 pixels to the patch;
    the same in every channel, without a mean. [n, d]."""
    channels, height, width = shape
    y, x = torch.meshgrid(*(torch.arange(side) - (side - 1) / 2 for side in (height, width)), indexing="ij")
    scales = max(1, math.ceil(n / 16))
    longest = max(float(min(height, width)), 2.5)
    made: list[Tensor] = []
    for scale in range(scales):
        length = 2.5 * (longest / 2.5) ** (scale / max(1, scales - 1))
        envelope = torch.exp(-(x.square() + y.square()) / (2 * (0.4 * length + 0.5) ** 2))
        for turn in range(8):
            along = x * math.cos(math.pi * turn / 8) + y * math.sin(math.pi * turn / 8)
            for phase in (0.0, math.pi / 2):
                wave = envelope * torch.cos(2 * math.pi * along / length - phase)
                made.append(wave - envelope * wave.sum() / envelope.sum())
    return unit_rows(torch.stack(made[:n])[:, None].expand(-1, channels, -1, -1).reshape(n, -1))


def dct_filters(n: int, shape: tuple[int, int, int]) -> Tensor:
    """The n lowest of the orthonormal cosines (DCT-II over channels, rows and columns). [n, d]."""
    check_directions(n, math.prod(shape), "dct")
    bases: list[Tensor] = []
    for side in shape:
        k, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
        basis = torch.cos(math.pi * k * (2 * place + 1) / (2 * side)) * math.sqrt(2 / side)
        basis[0] /= math.sqrt(2)
        bases.append(basis)
    rows = torch.einsum("ax,by,cz->abcxyz", *bases).reshape(math.prod(shape), -1)
    steps = torch.cartesian_prod(*(torch.arange(side) / side for side in shape))
    return rows[steps.reshape(len(rows), -1).sum(1).argsort(stable=True)[:n]].float()


def random_filters(n: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Gaussian directions [n, d]: what a network begins with."""
    return unit_rows(torch.randn(n, math.prod(shape), generator=torch.Generator().manual_seed(seed)))


def check_directions(n: int, d: int, kind: str) -> None:
    if n > d:
        raise UsageError(f"{n} {kind} filters of {d} numbers: there are only {d} directions; ask for at most {d}")
