"""Nearest neighbours beside a classifier (Jia et al., "Rethinking Nearest Neighbors", 2021, arXiv 2112.08459).

The vote of the k nearest training images, weighed by distance, is mixed with a linear classifier's probabilities:

    p(c) = mix p_kNN(c) + (1 - mix) softmax(z)_c,
    p_kNN(c) ~ sum of exp(-|q - v_i|^2 / T) over the neighbours i of class c,

with features centred on the training mean and then L2-normalised. It needs labels and nothing else; with several
labels per image the vote is one share per class and the classifier is one sigmoid per class. The paper's other use of
the vote, as a sign of easy and hard images while training, is the option `training` (its knn_reg and focal forms).

k, T and mix are tuned as the paper does on validation data, but inside the training rows: each row votes without
itself, the linear logits come from folds that had not seen it, and the weighted likelihood decides; mix 0 is a
candidate, and then the head is the linear layer alone. Where we depart: votes are computed in log-space (the
reference gives NaN when all weights underflow), and class weights count an image's vote as many.

When not to use it: when the model must be small or the images private, for the head holds every training feature
(5 KB an image); when a linear classifier is already right, for the tuned mix is then 0; and with more than some
hundred thousand images, where the exact search takes longer than the backbone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from foveal.blocks.heads import linear_head
from foveal.blocks.logistic import Tuned, logistic_regression
from foveal.blocks.statistics import check_rows, chunks, class_moments
from foveal.core.errors import UsageError
from foveal.core.method import Adapt, Spec, method
from foveal.core.options import option, options
from foveal.core.seeds import derive

NEIGHBOURS = tuple(2**i for i in range(10))
TEMPERATURES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 1.0, 10.0)
MIXES = tuple(i / 20 for i in range(20))
TUNING_ROWS = 1024
TUNING_ENTRIES = 2**24
TILE = 2**21


def inverse_norms(centred: Float[Tensor, "B D"], mean: Float[Tensor, " D"]) -> Float[Tensor, " B"]:
    """1 / |row| of each row [B, D]; 0 for one that differs from the mean by rounding alone, and so has no direction."""
    norms = centred.norm(dim=1)
    rounding = 8 * torch.finfo(mean.dtype).eps * mean.norm()
    return torch.where(norms > rounding, 1 / norms.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)


@dataclass(frozen=True)
class Datastore:
    """Features [n, D] as they came, their mean [D] (0 for none) and the inverse norms [n] of what is left of them.

    A row equal to the mean has no direction: its inverse norm is 0.
    """

    features: Tensor
    mean: Tensor
    inverse: Tensor

    @staticmethod
    def of(X: Tensor, normalise: Literal["l2nc", "l2"]) -> Datastore:
        mean = class_moments(X).mean[0].to(X.dtype) if normalise == "l2nc" else torch.zeros(X.shape[1], dtype=X.dtype)
        return Datastore(X, mean, torch.cat([inverse_norms(X[rows] - mean, mean) for rows in chunks(len(X))]))

    @property
    def queries(self) -> int:
        """How many queries to answer at once, for flat memory."""
        return max(16, TILE // max(1, len(self.features)))

    def similarities(self, q: Tensor) -> Tensor:
        """Minus the squared distance of queries q [B, D] to all rows [B, n], up to a constant of the query."""
        centred = q - self.mean
        direction = centred * inverse_norms(centred, self.mean)[:, None]
        products = direction @ self.features.T - (direction @ self.mean)[:, None]
        return products * (2 * self.inverse) - (self.inverse > 0).to(q.dtype)


def nearest(
    store: Datastore, q: Float[Tensor, "B D"], k: int, own: Tensor | None = None
) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """Similarities [B, k] and rows [B, k] of the nearest neighbours, best first.

    Args:
        own: row [B] of each query in the datastore, which is left out (leave-one-out).
    """
    if own is not None and (own.shape != (len(q),) or bool(((own < 0) | (own >= len(store.features))).any())):
        raise UsageError(f"leave-one-out needs one datastore row in 0..{len(store.features) - 1} for each query")
    if q.shape[1] != store.features.shape[1]:
        raise UsageError(f"queries of width {q.shape[1]} against features of width {store.features.shape[1]}")
    available = len(store.features) - (own is not None)
    if available < 1:
        raise UsageError("the datastore is empty: nearest neighbours need at least one labelled image")
    if k > available:
        warnings.warn(f"k={k} exceeds the {available} rows to choose from: using {available}", stacklevel=2)
        k = available
    best, index = torch.empty(len(q), k, dtype=q.dtype), torch.empty(len(q), k, dtype=torch.int64)
    for rows in chunks(len(q), store.queries):
        similarity = store.similarities(q[rows])
        if own is not None:
            similarity.scatter_(1, own[rows, None], -torch.inf)
        best[rows], index[rows] = similarity.topk(k, 1)
    return best, index


def vote(
    similarity: Float[Tensor, "B k"],
    labels: Shaped[Tensor, "B k ..."],
    temperature: Tensor | float,
    log_weights: Tensor | float = 0.0,
) -> Float[Tensor, "B ..."]:
    """Share [B, ...] of each class among neighbours with similarity [B, k] and labels [B, k, ...] of 0 and 1."""
    share = (similarity / temperature + log_weights).softmax(1).to(similarity.dtype)
    return torch.einsum("bk,bk...->b...", share, labels.to(share.dtype))


def mixed(p_knn: Tensor, p: Tensor, mix: Tensor | float) -> Tensor:
    return mix * p_knn + (1 - mix) * p


def regularised_factor(p_true: Tensor, strength: float) -> Tensor:
    """Weight of an image in the knn_reg loss: 1 + strength * -log p_kNN(y), at least 1; the log is cut at -100."""
    return 1 + strength * -p_true.detach().log().clamp_min(-100)


def focal_factor(p_true: Tensor, gamma: float) -> Tensor:
    """Weight of an image in the focal loss: (1 - p_kNN(y))^gamma, in [0, 1]."""
    return (1 - p_true.detach()).clamp(0, 1) ** gamma


def log_likelihoods(p_true: Tensor) -> Tensor:
    """Log-likelihood [m, ...] of each row from the probabilities [m, C or 1, ...] of what it is."""
    return p_true.clamp(1e-12, 1).log().sum(1)


def tune(
    similarity: Tensor,
    correct: Tensor,
    log_weights: Tensor,
    p_linear: Tensor,
    weights: Tensor,
    ks: tuple[int, ...],
    temperatures: tuple[float, ...],
    mixes: tuple[float, ...],
) -> tuple[int, float, float]:
    """k, T and mix with the greatest weighted likelihood; ties keep the smallest mix, then the first k and T.

    The mix is 0 unless the likelihood gains more than one standard error over the classifier's alone: the best of
    many settings always gains something by chance, the more so the fewer the rows.

    Args:
        similarity: [m, K] of each row's neighbours, best first; their log_weights [m, K].
        correct: [m, K, C] whether a neighbour agrees with the row about class c; C is 1 for one label per image.
        p_linear: [m, C] held-out probability of what the row is.
    """
    share, alone = weights / weights.sum(), log_likelihoods(p_linear)
    best, best_rows = (-torch.inf, ks[0], temperatures[0], mixes[0]), alone
    agree = correct.to(similarity.dtype)
    segments = list(pairwise([0, *ks]))
    blend = torch.tensor(mixes, dtype=similarity.dtype)
    for temperature in temperatures:
        scaled = similarity / temperature + log_weights
        mass = (scaled - scaled.amax(1, keepdim=True)).exp()
        hits = agree * mass[..., None]
        total = torch.stack([mass[:, a:b].sum(1) for a, b in segments], 1).cumsum(1)
        hit = torch.stack([hits[:, a:b].sum(1) for a, b in segments], 2).cumsum(2)
        p_knn = hit / total[:, None]
        of_rows = log_likelihoods(mixed(p_knn[..., None], p_linear[..., None, None], blend))
        score = torch.einsum("m,mij->ij", share, of_rows)
        i, j = divmod(int(score.argmax()), len(mixes))
        if float(score[i, j]) > best[0]:
            best, best_rows = (float(score[i, j]), ks[i], temperature, mixes[j]), of_rows[:, i, j]
    gain = best_rows - alone
    mean = (share * gain).sum()
    error = (share.square() * (gain - mean).square()).sum().sqrt()
    return best[1], best[2], 0.0 if 0.0 in mixes and mean <= error else best[3]


class NeighbourMix(nn.Module):
    """Features [B, D] -> log of the mixed probabilities [B, C] (their logit when images have several labels).

    State: the datastore, its labels [n, C] of 0 and 1, log_weights [n], ranks [k], the linear layer, and two scalars.
    `several` is stored as the length of an empty buffer, so that shapes alone rebuild the module.
    """

    features: Tensor
    mean: Tensor
    inverse: Tensor
    labels: Tensor
    log_weights: Tensor
    ranks: Tensor
    several: Tensor
    temperature: Tensor
    mix: Tensor

    def __init__(self, n: int, width: int, classes: int, k: int, several: bool) -> None:
        super().__init__()
        self.register_buffer("features", torch.empty(n, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("inverse", torch.zeros(n))
        self.register_buffer("labels", torch.zeros(n, classes, dtype=torch.uint8))
        self.register_buffer("log_weights", torch.zeros(n))
        self.register_buffer("ranks", torch.arange(k))
        self.register_buffer("several", torch.zeros(int(several)))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("mix", torch.zeros(()))
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        store = Datastore(self.features, self.mean, self.inverse)
        if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or len(x) <= store.queries:
            return self.mixed_logits(store, x)
        return torch.cat([self.mixed_logits(store, part) for part in x.split(store.queries)])

    def mixed_logits(self, store: Datastore, x: Tensor) -> Tensor:
        similarity, rows = store.similarities(x).topk(len(self.ranks), 1)
        p_knn = vote(similarity, self.labels[rows], self.temperature, self.log_weights[rows])
        tiny = torch.finfo(x.dtype).tiny
        if len(self.several):
            p = mixed(p_knn, self.linear(x).sigmoid(), self.mix)
            return p.clamp_min(tiny).log() - (1 - p).clamp_min(1e-7).log()
        return mixed(p_knn, self.linear(x).softmax(1), self.mix).clamp_min(tiny).log()


@options
class Options:
    """What `nn-revisit` can be told."""

    k: int = option(0, "neighbours that vote; 0 tunes it among 1, 2, 4, ... 512", ge=0)
    temperature: float = option(0.0, "T of the distance weights, in squared distance; 0 tunes it in 0.01..10", ge=0)
    mix: float = option(-1.0, "share of the vote in the probabilities, 0..1; -1 tunes it", ge=-1, le=1)
    normalise: Literal["l2nc", "l2"] = option("l2nc", "L2-normalise features, after centring (l2nc) or as they are")
    training: Literal["plain", "reg", "focal"] = option(
        "plain", "how the vote weighs images when the classifier is fitted"
    )
    strength: float = option(1.0, "lambda_1 of training=reg", ge=0)
    gamma: float = option(2.0, "gamma of training=focal", ge=0)


@method(
    Spec(
        family="adapt",
        title="Nearest neighbours mixed with a linear classifier",
        year=2021,
        arxiv="2112.08459",
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class NnRevisit(Adapt):
    def fit_features(self, X: Tensor, y: Tensor, weights: Tensor, seed: int) -> nn.Module:
        chosen: Options = self.options
        if -1 < chosen.mix < 0:
            raise UsageError(f"mix={chosen.mix}: expected 0 to 1, or -1 to tune it")
        classes = check_rows(X, y, weights)
        labels = (y if y.ndim == 2 else F.one_hot(y, classes)).to(torch.uint8)
        store = Datastore.of(X, chosen.normalise)
        fitted = logistic_regression(X, y, self.image_weights(store, y, weights), classes, seed=seed)
        assert fitted.tuned is not None
        layer = linear_head(fitted.weight, fitted.bias)
        k, temperature, mix = self.tuned(store, labels, weights, fitted.tuned, y.ndim == 2, seed)
        if mix == 0:
            return layer
        head = NeighbourMix(len(X), X.shape[1], classes, min(k, len(X)), y.ndim == 2)
        head.features, head.mean, head.inverse = store.features, store.mean, store.inverse
        head.labels, head.log_weights, head.linear = labels, weights.log(), layer
        head.temperature.fill_(temperature)
        head.mix.fill_(mix)
        return head

    def image_weights(self, store: Datastore, y: Tensor, weights: Tensor) -> Tensor:
        """Weights of images when the classifier is fitted: easy and hard ones told apart by their neighbours."""
        chosen: Options = self.options
        if chosen.training == "plain":
            return weights
        if y.ndim == 2:
            raise UsageError(f"training={chosen.training} needs one label per image: use training=plain")
        own = torch.arange(len(y))
        similarity, rows = nearest(store, store.features, min(chosen.k or 16, len(y) - 1), own)
        p_true = vote(similarity, y[rows] == y[:, None], chosen.temperature or 0.1, weights.log()[rows])
        if chosen.training == "reg":
            return weights * regularised_factor(p_true, chosen.strength)
        return weights * focal_factor(p_true, chosen.gamma)

    def tuned(
        self, store: Datastore, labels: Tensor, weights: Tensor, held_out: Tuned, several: bool, seed: int
    ) -> tuple[int, float, float]:
        """k, T and mix: as given, and otherwise the likeliest for a sample of rows, each left out of its own vote."""
        chosen: Options = self.options
        n, classes = labels.shape
        if chosen.k > n:
            warnings.warn(f"k={chosen.k} exceeds the {n} images: using {n}", stacklevel=3)
        ks = (min(chosen.k, n - 1),) if chosen.k else tuple(k for k in NEIGHBOURS if k <= min(n - 1, max(16, n // 4)))
        temperatures = (chosen.temperature,) if chosen.temperature else TEMPERATURES
        mixes = (chosen.mix,) if chosen.mix >= 0 else MIXES
        if len(ks) == len(temperatures) == len(mixes) == 1:
            return chosen.k, temperatures[0], mixes[0]

        limit = min(TUNING_ROWS, TUNING_ENTRIES // (ks[-1] * classes)) if several else TUNING_ROWS
        order = torch.randperm(len(held_out.rows), generator=torch.Generator().manual_seed(derive(seed, "tune")))
        sample = order[: max(1, limit)].sort().values
        rows, logits = held_out.rows[sample], held_out.logits[sample]
        similarity, neighbours = nearest(store, store.features[rows], ks[-1], rows)
        truth = labels[rows]
        if several:
            correct = labels[neighbours] == truth[:, None]
            p_linear = torch.where(truth > 0, logits.sigmoid(), (-logits).sigmoid())
        else:
            y = labels.argmax(1)
            correct = (y[neighbours] == y[rows][:, None])[..., None]
            p_linear = logits.softmax(1).gather(1, y[rows][:, None])
        k, temperature, mix = tune(
            similarity, correct, weights.log()[neighbours], p_linear, weights[rows], ks, temperatures, mixes
        )
        return chosen.k or k, temperature, mix

    def head(self, shapes: Mapping[str, torch.Size]) -> nn.Module:
        if "features" not in shapes:
            return super().head(shapes)
        (n, width), classes = shapes["features"], shapes["labels"][1]
        return NeighbourMix(n, width, classes, shapes["ranks"][0], bool(shapes["several"][0]))
