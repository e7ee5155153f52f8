"""What a text means to a network that never saw text: the classifier row it would have.

An ImageNet classifier holds one row for each of its 1,000 classes, and their names are words. Ridge regression from
the names' sentence vectors t to the rows w, in the feature space of a Gaussian kernel,

    w(t) = w_mean + K(t, T) [K(T, T) + strength I]^-1 (W - w_mean),   K(a, b) = exp(-2 |a - b|^2),

answers for any other text: features along w(t) - w_mean speak for it. The strength is the one with which classes that
were left out, one at a time, find their own row best (leave one out in closed form). Nothing is downloaded: network
and sentence encoder are files of installed packages, and the names are timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.backbones.adapter import DEFAULT, imagenet_classifier
from foveal.backbones.text import TEMPLATES, TextTower, embed, embed_names, sentence_encoder
from foveal.core.errors import BackboneError

CLASSES = 1000
SHARPNESS = 2.0
STRENGTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)


def similarity(a: Tensor, b: Tensor, sharpness: float | None) -> Tensor:
    """K [n, m] of unit vectors a [n, d] and b [m, d]; None: their inner product, which makes the ridge linear."""
    inner = a @ b.T
    return inner if sharpness is None else torch.exp(sharpness * (2 * inner - 2))


@dataclass(frozen=True)
class Ridge:
    """Unit text vectors [m, d] -> centred rows [m, D]: what sets a row apart from the mean row.

    Attributes:
        texts, weights: of the known classes, [n, d] and [n, D].
        columns: mean of K over the known classes [n].
        strength: the one that was chosen.
        held_out: mean reciprocal rank of a left-out class's own row among all, by strength.
    """

    texts: Tensor
    weights: Tensor
    columns: Tensor
    sharpness: float | None
    strength: float
    held_out: dict[float, float]

    def __call__(self, texts: Tensor) -> Tensor:
        K = similarity(texts, self.texts, self.sharpness)
        K = K - K.mean(1, keepdim=True) - self.columns + self.columns.mean()
        return K @ self.weights


def fit_ridge(
    texts: Tensor,
    rows: Tensor,
    sharpness: float | None = SHARPNESS,
    strengths: Sequence[float] = STRENGTHS,
) -> Ridge:
    """The ridge map from unit text vectors [n, d] to rows [n, D], its strength chosen by leaving out each class once.

    Leaving row i out changes its prediction to (p_i - h_ii y_i) / (1 - h_ii), h being the matrix that maps targets to
    predictions: one eigendecomposition serves all strengths and all rows.
    """
    n = len(texts)
    centred = rows - rows.mean(0)
    K = similarity(texts, texts, sharpness)
    columns = K.mean(0)
    values, vectors = torch.linalg.eigh((K - columns - columns[:, None] + columns.mean()).double())
    values, vectors = values.clamp_min(0).to(rows.dtype), vectors.to(rows.dtype)
    turned = vectors.T @ centred
    held_out: dict[float, float] = {}
    for strength in strengths:
        share = values / (values + strength)
        own = vectors.square() @ share + 1 / n
        left_out = (vectors @ (share[:, None] * turned) - own[:, None] * centred) / (1 - own)[:, None]
        held_out[strength] = float((1 / ranks_of_own(left_out, centred)).mean())
    strength = max(strengths, key=lambda each: held_out[each])
    weights = vectors @ (turned / (values + strength)[:, None])
    return Ridge(texts, weights, columns, sharpness, strength, held_out)


def ranks_of_own(predicted: Tensor, rows: Tensor) -> Tensor:
    """Rank from 1 [n] of row i among rows [n, D] by cosine with predicted [n, D] i; the worse one where it ties."""
    cosine = F.normalize(predicted) @ F.normalize(rows).T
    return (cosine >= cosine.diagonal()[:, None]).sum(1).double()


def imagenet_names() -> tuple[list[str], list[str]]:
    """Of each of the 1,000 classes, in the order of the classifier: its names ('tench, Tinca tinca'), its meaning."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    full = info.label_descriptions(detailed=True)
    names = info.label_descriptions()
    return list(names), [text.removeprefix(f"{name}: ") for name, text in zip(names, full, strict=True)]


def known_texts(
    tower: TextTower,
    names: Sequence[str],
    meanings: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Unit vectors [n, d] of known classes: of the names, of a photo of them, and with their meaning; averaged."""
    forms = ("{name}", "a photo of {name}", "{name}: {meaning}")
    texts = [form.format(name=n, meaning=m) for n, m in zip(names, meanings, strict=True) for form in forms]
    return F.normalize(embed(tower, texts, progress=progress).unflatten(0, (len(names), len(forms))).mean(1))


def imagenet_ridge(
    backbone: str = DEFAULT, *, offline: bool = False, progress: Callable[[int, int], None] | None = None
) -> tuple[Ridge, float]:
    """The map from the sentence encoder's vectors to rows of an ImageNet network, and the mean length of its centred
    rows.

    Raises:
        BackboneError: the network has no ImageNet classifier of one linear layer.
        MissingExtra: the sentence encoder is not installed.
    """
    W = cast(Tensor, imagenet_classifier(backbone, offline=offline).head.weight).detach()
    if len(W) != CLASSES:
        raise BackboneError(f"the classifier of {backbone} has {len(W)} classes: expected the 1,000 of ImageNet")
    ridge = fit_ridge(known_texts(sentence_encoder(), *imagenet_names(), progress), F.normalize(W))
    return ridge, float((W - W.mean(0)).norm(dim=1).mean())


def rows_for(
    labels: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    backbone: str = DEFAULT,
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Directions [C, D] in the feature space of an ImageNet network: features along them speak for a label.

    All are as long as the classifier's centred rows are on average, so that inner products with features have about
    the spread of its logits.

    Raises:
        BackboneError, MissingExtra: see `imagenet_ridge`.
        DataError: no template, or one without {}.
    """
    ridge, length = imagenet_ridge(backbone, offline=offline, progress=progress)
    return length * F.normalize(ridge(embed_names(sentence_encoder(), labels, templates)))
