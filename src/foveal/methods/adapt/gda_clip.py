"""GDA-CLIP (Wang et al., ICLR 2024, arXiv 2402.04087), the part that needs no text.

Unit-norm features of every class are taken as Gaussians with one covariance S, whose inverse is the
Kubokawa-Srivastava estimate; Bayes' rule then is a linear classifier in closed form, with nothing to tune:

    P = D [(N - 1) S + tr(S) I]^-1,    W = P mu^T,    b_c = log pi_c - mu_c^T P mu_c / 2.

This is linear discriminant analysis with shrinkage D / (N - 1 + D): nearest mean when images are few, full
discriminant analysis when they are many. It needs labels and nothing else; features are L2-normalised in the head.

Where we depart from the paper: without text there is no zero-shot term, and so no alpha to choose on validation
data: alpha would only scale the logits, which the temperature does later. Words that need no download, mixed in by an
alpha chosen on folds, did not help on held-out images (few-shot, on the page of `clip`), so they are no option. One
image per class leaves S = 0, where the reference's pseudo-inverse silently answers W = 0: here it is the nearest mean,
with a warning. Statistics are gathered in one pass and merge exactly, so classes and images can be added without the
old images.

When not to use it: with some tens of images a class, logistic regression with a tuned penalty (`linear`) is as good
or better, and on easy data clearly so; when classes are several clusters, or differ in spread rather than in mean,
no linear rule will do (`nn-revisit`); with several labels per image the Gaussians are not defined and it refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.blocks.heads import linear_head
from foveal.blocks.statistics import check_rows, chunks
from foveal.core.method import Adapt, Spec, method
from foveal.core.options import option, options

ROWS, COLUMNS = 2048, 320


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of labelled features: weight [C], mean [C, D], scatter about the class means [D, D].

    float64. `merge` is exact in any order; a class without images has weight 0.
    """

    weight: Tensor
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor, weights: Tensor, classes: int) -> Statistics:
        """Statistics of one block of features x [n, D]; products in x's precision, sums of blocks in float64."""
        members = torch.zeros(classes, len(x), dtype=torch.float64)
        members[y, torch.arange(len(x))] = weights.double()
        weight = members.sum(1)
        mean = (members / weight.clamp_min(torch.finfo(torch.float64).tiny)[:, None]) @ x.double()
        z = (x - mean.to(x.dtype)[y]) * weights.to(x.dtype).sqrt()[:, None]
        scatter = torch.empty(x.shape[1], x.shape[1], dtype=torch.float64)
        for left in range(0, x.shape[1], COLUMNS):  # the upper triangle alone, in strips
            scatter[left : left + COLUMNS, left:] = z[:, left : left + COLUMNS].T @ z[:, left:]
        upper = scatter.triu_()
        return Statistics(weight, mean, upper + upper.triu(1).T)

    def merge(self, other: Statistics) -> Statistics:
        weight = self.weight + other.weight
        share = (other.weight / weight.clamp_min(torch.finfo(torch.float64).tiny))[:, None]
        apart = other.mean - self.mean
        between = (apart * (self.weight[:, None] * share)).T @ apart
        return Statistics(weight, self.mean + share * apart, self.scatter + other.scatter + between)


def precision_cholesky(scatter: Float[Tensor, "D D"], images: int | float) -> Float[Tensor, "D D"]:
    """Lower Cholesky factor [D, D] of P^-1 = [(N - 1) S + tr(S) I] / D, where (N - 1) S is `scatter`."""
    D = len(scatter)
    inverse = scatter / D
    inverse.diagonal().add_(scatter.trace() / ((images - 1) * D))
    return torch.linalg.cholesky(inverse)


def discriminant(
    statistics: Statistics, prior: Float[Tensor, " C"]
) -> tuple[Float[Tensor, "D C"], Float[Tensor, " C"]]:
    """W [D, C] and b [C] of the Gaussian discriminant with class probabilities `prior` [C].

    Without any spread inside the classes P is D I: the nearest mean.
    """
    mean, D = statistics.mean, statistics.mean.shape[1]
    if statistics.scatter.trace() <= 1e-12 * statistics.weight.sum():
        warnings.warn("no spread inside any class (one image each?): using the nearest class mean", stacklevel=2)
        W = D * mean.T
    else:
        factor = precision_cholesky(statistics.scatter, float(statistics.weight.sum()))
        W = torch.cholesky_solve(mean.T, factor)
    return W, prior.log() - (mean * W.T).sum(1) / 2


class NormalisedLinear(nn.Linear):
    """Features [B, D] -> L2-normalised -> logits [B, C]."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), self.weight, self.bias)


@options
class Options:
    """What `gda-clip` can be told."""

    prior: Literal["uniform", "observed"] = option(
        "uniform", "class probabilities: all equal, or their (weighted) share"
    )


@method(Spec(family="adapt", title="GDA-CLIP (text-free)", year=2024, arxiv="2402.04087"), Options)
class GdaClip(Adapt):
    def fit_features(self, X: Tensor, y: Tensor, weights: Tensor, seed: int) -> nn.Module:
        classes = check_rows(X, y, weights, several=False)
        total: Statistics | None = None
        for rows in chunks(len(X), ROWS):
            block = Statistics.of(F.normalize(X[rows]), y[rows], weights[rows], classes)
            total = block if total is None else total.merge(block)
        assert total is not None
        share = total.weight if self.options.prior == "observed" else torch.ones_like(total.weight)
        W, b = discriminant(total, share / share.sum())
        weight = W.T - W.mean(1)  # what all classes share changes no probability, but costs float32 digits
        return linear_head(weight, b - b.mean(), NormalisedLinear)

    def head(self, shapes: Mapping[str, torch.Size]) -> nn.Module:
        classes, width = shapes["weight"]
        return NormalisedLinear(width, classes)
