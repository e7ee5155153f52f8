"""UDML-SS: unsupervised deep metric learning with a rotation loss (Cao, Chen and Lim 2019, arXiv 1911.07072).

Clusters stand in for classes. Every few epochs the pool is clustered, and the embedding z = W f(x) / |W f(x)| learns
to tell the clusters apart by the multi-similarity loss, while f also learns which way up an image is:

    L = L_MS(z, cluster) + eta L_rot(f),
    L_MS = 1/n sum_i [ 1/b log(1 + sum_P e^(-b (S_ij - l))) + 1/a log(1 + sum_N e^(a (S_ij - l))) ],

with S = z z^T, b = 2 on positives, a = 40 on negatives, l = 0.5. Mining keeps a negative above the least positive
similarity minus 0.1, and a positive below the greatest negative plus 0.1; an image without any adds 0 and stays in n.
The rotation keeps the features sane while the clusters are still wrong. It needs images and a guess of the number of
clusters; labels are never read.

Where we depart from the paper: AdamW; features are brought to length 1 before the first clustering, which reads the
backbone's own; a later one starts from the means of the clusters before it, over the features as they are now (the
paper keeps the centroids); clusters smaller than their share of a batch repeat images. 600 epochs became 20.

When not to use it: where a picture turned round is the same picture (cells, weave): the rotation loss then stays at
log 4, of which a warning tells, and eta=0 is as good; with labels, train on them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from foveal.blocks.kmeans import kmeans
from foveal.core.errors import DataError, UsageError
from foveal.core.families.retrieve import Embedding, Retrieve
from foveal.core.method import Recipe, Spec, method
from foveal.core.options import option, options
from foveal.core.seeds import derive, generator

POSITIVE, NEGATIVE, BASE, MARGIN = 2.0, 40.0, 0.5, 0.1
TURNS = 4
UNLEARNT = 0.95
"""Share of log 4 above which the rotation counts as not learnt."""


def mine(
    S: Float[Tensor, "n n"], labels: Int64[Tensor, " n"], margin: float = MARGIN
) -> tuple[Bool[Tensor, "n n"], Bool[Tensor, "n n"]]:
    """Pairs (positive, negative) [n, n] worth learning from, by similarity S; a row keeps both kinds or neither."""
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(S), dtype=torch.bool, device=S.device), ~same
    least = S.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    most = S.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    return positive & (S - margin < most), negative & (S + margin > least)


def multi_similarity(z: Float[Tensor, "n D"], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
    """Multi-similarity loss (Wang et al. 2019) of unit vectors over mined pairs, the mean over all n of them."""
    S = z @ z.T
    positive, negative = mine(S.detach(), labels)
    pull = log1p_sum(-POSITIVE * (S - BASE), positive) / POSITIVE
    push = log1p_sum(NEGATIVE * (S - BASE), negative) / NEGATIVE
    return (pull + push).mean()


def log1p_sum(x: Float[Tensor, "n n"], kept: Bool[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """log(1 + sum of e^x over what is kept of each row)."""
    x = x.masked_fill(~kept, -torch.inf)
    return torch.cat([x, x.new_zeros(len(x), 1)], 1).logsumexp(1)


def turned(images: Float[Tensor, "r c s s"]) -> tuple[Float[Tensor, "_ c s s"], Int64[Tensor, " _"]]:
    """Every image turned by 0, 90, 180 and 270 degrees, and which of these it was: [4 r, ...], [4 r]."""
    views = torch.cat([images.rot90(turn, (2, 3)) for turn in range(TURNS)])
    return views, torch.arange(TURNS, device=images.device).repeat_interleave(len(images))


def balanced(
    labels: Int64[np.ndarray, " n"], clusters: int, each: int, count: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """`count` batches of `each` images of `clusters` clusters drawn without repetition; clusters with fewer images
    repeat them.

    Raises:
        DataError: fewer clusters have any image.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    if len(members) < clusters:
        sizes = ", ".join(str(len(each)) for each in sorted(members, key=len, reverse=True)[:10])
        raise DataError(
            f"the images fell into {len(members)} clusters (sizes {sizes}), a batch needs {clusters}: choose fewer "
            "clusters or a smaller batch_size, or look whether the images are all alike"
        )
    batches = []
    for _ in range(count):
        drawn = rng.choice(len(members), clusters, replace=False)
        rows = [np.resize(rng.permutation(members[one]), each) for one in drawn]
        batches.append(np.concatenate(rows))
    return batches


class Learner(nn.Module):
    """Backbone, metric head and rotation head, and which cluster each image is in.

    The backbone's batch norms stay as they were pretrained.
    """

    clusters: Tensor
    looked: Tensor
    turning: Tensor

    def __init__(self, backbone: Any, width: int, images: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, width)
        self.rotation = nn.Linear(backbone.width, TURNS)
        self.register_buffer("clusters", torch.full((images,), -1, dtype=torch.int64))
        self.register_buffer("looked", torch.tensor(-1))
        self.register_buffer("turning", torch.tensor(0.0))

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """What the next look clusters: [B, 3, H, W] -> the backbone's features before training, then z."""
        features = self.backbone(images)
        return F.normalize(features if self.looked < 0 else self.head(features), dim=1)


@options
class Options:
    """What `udml-ss` can be told."""

    clusters: int = option(100, "guess of the number of kinds of images (k)", ge=2)
    width: int = option(512, "numbers of the embedding (D)", ge=1, le=4096)
    epochs: int = option(20, "passes over the images", ge=1)
    every: int = option(5, "epochs between two clusterings", ge=1)
    batch_size: int = option(80, "images of a batch", ge=4)
    each: int = option(5, "images of a cluster in a batch", ge=2)
    lr: float = option(1e-5, "highest learning rate", gt=0, le=1)
    weight_decay: float = option(5e-4, "weight decay", ge=0, le=1)
    eta: float = option(0.1, "weight of the rotation loss", ge=0, le=100)
    turned: int = option(16, "images of a batch that are turned four ways", ge=1)


@method(
    Spec(
        family="retrieve",
        title="UDML-SS",
        year=2019,
        arxiv="1911.07072",
        needs=frozenset({"gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class UdmlSs(Retrieve):
    def recipe(self) -> Recipe:
        chosen: Options = self.options
        return Recipe(chosen.epochs, chosen.batch_size, chosen.lr, chosen.weight_decay)

    def attach(self, backbone: Any, images: int) -> nn.Module:
        """
        Raises:
            UsageError: too few images for the clusters or the batch.
        """
        chosen: Options = self.options
        if 2 * chosen.clusters > images:
            raise UsageError(
                f"clusters={chosen.clusters} of {images} images leaves fewer than 2 each: choose at most {images // 2}"
            )
        per_batch = chosen.batch_size // chosen.each
        if not 2 <= per_batch <= chosen.clusters or chosen.batch_size > images:
            raise UsageError(
                f"batch_size={chosen.batch_size} holds {per_batch} clusters of each={chosen.each}, expected 2 to "
                f"clusters={chosen.clusters}, and at most the {images} images in all"
            )
        return Learner(backbone, chosen.width, images)

    def every(self) -> int:
        return self.options.every

    def look(self, model: Learner, vectors: Float[Tensor, "n _"], seed: int) -> None:
        known = model.clusters.cpu() if model.looked >= 0 else None
        found = kmeans(vectors.cpu(), self.options.clusters, derive(seed, "clusters"), labels=known)
        model.clusters.copy_(found)

    def batches(self, model: Learner, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """
        Raises:
            DataError: the clusters collapsed.
        """
        labels, each = model.clusters.cpu().numpy(), self.options.each
        per_batch = size // each
        count = max(1, len(labels) // (per_batch * each))
        return balanced(labels, per_batch, each, count, generator(seed, "batches", epoch))

    def loss(self, model: Learner, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`batch` has images [B, 3, S, S] and their numbers `index` [B]."""
        z = F.normalize(model.head(model.backbone(batch["images"])), dim=1)
        metric = multi_similarity(z.float(), model.clusters[batch["index"]])
        if not self.options.eta:
            return {"loss": metric, "metric": metric}
        drawn = torch.randint(len(z), (self.options.turned,), device=z.device)
        views, turns = turned(batch["images"][drawn])
        rotation = F.cross_entropy(model.rotation(model.backbone(views)).float(), turns)
        model.turning.lerp_(rotation.detach(), 0.05 if model.turning > 0 else 1.0)
        return {"loss": metric + self.options.eta * rotation, "metric": metric, "rotation": rotation}

    def finish(self, model: Learner) -> Embedding:
        if model.turning > UNLEARNT * math.log(TURNS):
            warnings.warn(
                f"the rotation loss ends at {float(model.turning):.2f}, close to log 4: these images look the same "
                "turned round, or training was short; eta=0 may be as good",
                stacklevel=2,
            )
        return Embedding(model.backbone, model.head)
