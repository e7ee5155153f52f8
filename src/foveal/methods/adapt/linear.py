"""Logistic regression on frozen features: the baseline every other method has to beat.

A linear layer is fitted to the features of a frozen backbone by maximum likelihood with an L2 penalty,

    min_W,b  sum_i w_i loss(W x_i + b, y_i) + |W|^2 / (2 c),

on features standardised with the training rows' mean and deviation; the standardisation is folded into the
weights, so what comes out is a plain `nn.Linear`. The loss is the softmax cross-entropy, or one sigmoid per class
when an image has several labels. Kornblith, Shlens and Le (2019, arXiv 1805.08974) show how well this transfers
from ImageNet backbones. It needs labels and nothing else.

The strength c is scikit-learn's `C`: at the same value the weights agree. With c=0 it is chosen among eight values
by log-loss on folds of the rows given, so test images and calibration folds are never looked at.

When not to use it: with a handful of images a class there is nothing to choose c on, and `gda-clip`, which has
nothing to choose, is often ahead; with several thousand images unlike those the backbone was trained on, `full` or
`lora` can change the features, which no linear layer can; with classes that are scattered clusters, `nn-revisit`
follows them.
"""

from __future__ import annotations

from torch import Tensor, nn

from foveal.blocks.heads import linear_head
from foveal.blocks.logistic import logistic_regression
from foveal.blocks.statistics import check_rows
from foveal.core.method import Adapt, Spec, method
from foveal.core.options import option, options


@options
class Options:
    """What `linear` can be told."""

    c: float = option(
        0.0, "inverse strength of the L2 penalty (scikit-learn's C); 0 chooses it by held-out log-loss", ge=0
    )


@method(
    Spec(
        family="adapt",
        title="Logistic regression on frozen features",
        year=2019,
        arxiv="1805.08974",
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Linear(Adapt):
    def fit_features(self, X: Tensor, y: Tensor, weights: Tensor, seed: int) -> nn.Module:
        classes = check_rows(X, y, weights)
        c: float = self.options.c
        fitted = logistic_regression(X, y, weights, classes, c=c, seed=seed, tolerance=2e-6 if c else 1e-4)
        return linear_head(fitted.weight, fitted.bias)
