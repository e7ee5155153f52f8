"""Naive-Bayes probe (Zheng et al., "Revisiting Discriminative vs. Generative Classifiers", 2023, arXiv 2302.02334).

Every feature is a Gaussian per class, independent of the others, with a variance v_j shared by the classes; Bayes'
rule then is a linear classifier in closed form:

    score_k(x) = log pi_k - sum_j (x_j - mu_kj)^2 / (2 v_j),    v = sum_k pi_k v_k.

One pass over the features, no optimiser, nothing to tune; statistics of two sites merge exactly. The paper's theory
says it nears its own best with O(log D) images where logistic regression needs O(D): it learns fast and stops early.
It needs labels and nothing else.

Where we depart from the paper: a class missing from one block is kept when blocks merge (the reference loses it);
scores are taken relative to the overall mean, which changes every class alike and keeps float32 logits accurate for
features that hardly vary; class weights count an image as many, in pi_k as in v.

When not to use it: with more than about 16 images a class almost anything here is more accurate, because features of
deep networks are far from independent (its probabilities are badly overconfident too, until they are calibrated);
use it as a probe of how much of the task the features hold one by one, or where only sums may leave a site.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveal.blocks.heads import linear_head
from foveal.blocks.statistics import ClassMoments, check_rows, class_moments
from foveal.core.method import Adapt, Spec, method
from foveal.core.options import option, options


def shared_variance(moments: ClassMoments) -> Float[Tensor, " D"]:
    """Pooled within-class variance v [D]; the total variance, with a warning, when no class has any spread."""
    pi = (moments.weight / moments.weight.sum())[:, None]
    within = (pi * moments.variance).sum(0)
    within = torch.where(within > 1e-24 * moments.mean.square().amax(0), within, 0.0)  # else rounding, not spread
    if bool((within > 0).any()):
        return within
    warnings.warn("no spread inside any class (one image each?): using the variance over all classes", stacklevel=2)
    return within + (pi * (moments.mean - (pi * moments.mean).sum(0)).square()).sum(0)


def default_eps(variance: Float[Tensor, " D"]) -> float:
    """What to add to variances [D] so that dead features do not dominate: max(1e-9, median / 1000)."""
    return max(1e-9, 1e-3 * float(variance.median()))


def naive_bayes(
    moments: ClassMoments, prior: Float[Tensor, " C"], eps: float
) -> tuple[Float[Tensor, "C D"], Float[Tensor, " C"]]:
    """Weight [C, D] and bias [C] of the naive Bayes rule, less the score of the overall mean (common to all classes).

    A feature whose variance plus eps is 0 is left out.
    """
    variance = shared_variance(moments) + eps
    inverse = torch.where(variance > 0, 1 / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)
    centre = (moments.weight[:, None] * moments.mean).sum(0) / moments.weight.sum()
    weight = (moments.mean - centre) * inverse
    return weight, prior.log() - (weight * (moments.mean + centre)).sum(1) / 2


@options
class Options:
    """What `naive-bayes-probe` can be told."""

    eps: float = option(0.0, "added to every variance; 0 takes max(1e-9, 1/1000 of the median variance)", ge=0)


@method(Spec(family="adapt", title="Naive-Bayes probe", year=2023, arxiv="2302.02334"), Options)
class NaiveBayesProbe(Adapt):
    def fit_features(self, X: Tensor, y: Tensor, weights: Tensor, seed: int) -> nn.Module:
        classes = check_rows(X, y, weights, several=False)
        moments = class_moments(X, y, weights, classes)
        eps = self.options.eps or default_eps(shared_variance(moments))
        weight, bias = naive_bayes(moments, moments.weight / moments.weight.sum(), eps)
        return linear_head(weight, bias)
