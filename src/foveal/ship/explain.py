"""Why a Bundle answers as it does: one heat map for each photo, in the photo's own pixels."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.backbones.adapter import Backbone
from foveal.backbones.wrapper import OpenModel, Scorer
from foveal.core import catalogue
from foveal.core.errors import BackboneError, UsageError
from foveal.core.method import Classifier, Explain
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset
from foveal.data.images import seen_box, to_pixels
from foveal.data.open import open_images
from foveal.evaluate import explanation
from foveal.evaluate.overlay import overlay
from foveal.features.scorer import feature_scorer
from foveal.features.session import pick_device
from foveal.ship.answer import answer, unreadable

if TYPE_CHECKING:
    from foveal.ship.bundle import Bundle

DEFAULT = "sobol-attribution:index=effect,grid=6,points=8"
"""What came to the best deletion score of all that `benchmarks/explain.py` measures, in 296 passes."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """One photo's heat map.

    Attributes:
        row: what `predict` answers for the photo; with `error`, it could not be decoded and there is no map.
        target: the class that is explained, and its probability.
        map: float32 [H, W] of the photo, the higher the more a pixel matters; 0 where the model does not look.
        scores: deletion and insertion (probability of the target, averaged over the way) of the map and its rivals.
        notes: warnings of the method.
    """

    row: dict[str, Any]
    target: str | None = None
    probability: float | None = None
    map: np.ndarray | None = None
    scores: dict[str, dict[str, float]] | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    photo: Image.Image | None = None
    seen: tuple[float, float, float, float] = (0, 0, 0, 0)

    def overlay(self) -> Image.Image:
        """The map over the photo, at the photo's resolution.

        Raises:
            UsageError: the photo could not be decoded.
        """
        if self.map is None or self.photo is None:
            raise UsageError(f"{self.row['image']} has no map: {self.row.get('error')}")
        return overlay(self.photo, self.map, self.seen)

    def to_dict(self) -> dict[str, Any]:
        """All but the map, as plain data."""
        return {
            **self.row,
            "target": self.target,
            "target_probability": self.probability,
            "scores": self.scores,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def explain_images(
    bundle: Bundle,
    images: Dataset | str | Path | Image.Image | np.ndarray | Iterable[str | Path | Image.Image | np.ndarray],
    choice: str = DEFAULT,
    *,
    target: str | None = None,
    score: bool = True,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Explanation]:
    """Heat maps of a Bundle's answers, one at a time, in the order of the images.

    A method that needs scores alone runs on the fastest session that agrees with torch.

    Args:
        images: files, folders, PIL images or uint8 arrays [H, W, 3].
        choice: NAME or NAME:key=value,... of an explain method.
        target: the class to explain; None: for each image the class with the highest probability.
        score: also measure deletion and insertion, beside orders at random, the centre and the channel norm.
        progress: called with images scored by the network and their total.

    Raises:
        UsageError: no such method, or one of another family; no such class.
        DataError: no image.
    """
    method = chosen(choice)
    wanted = None if target is None else class_index(bundle, target)
    if not isinstance(images, Dataset):
        single = isinstance(images, str | Path | np.ndarray) or hasattr(images, "getbands")
        images = open_images([images] if single else list(images))  # type: ignore[list-item]
    return explained(bundle, images, method, wanted, score, device, progress)


def explained(
    bundle: Bundle,
    dataset: Dataset,
    method: Explain,
    wanted: int | None,
    score: bool,
    device: str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Explanation]:
    probabilities, unknown, errors = bundle.infer(dataset, device=device)
    open_model = open_model_of(bundle, device)
    scorer = scorer_of(bundle, device)
    model = open_model if method.spec.needs else scorer
    each = method.passes() + (explanation.passes(explanation.DRAWS + 3) if score else 0)
    done = 0

    def count(images: Tensor) -> Tensor:
        nonlocal done
        done += len(images)
        if progress:
            progress(min(done, each * len(dataset)), each * len(dataset))
        return inner(images)

    inner, scorer.score = scorer.score, count
    for row in range(len(dataset)):
        done = row * each
        if row in errors:
            yield Explanation(unreadable(dataset.ids[row], errors[row]))
            continue
        index = int(probabilities[row].argmax()) if wanted is None else wanted
        start = time.perf_counter()
        photo = dataset.image(row)
        square = squares(photo, bundle.preprocessing).to(open_model.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = method.explain(model, square, torch.tensor([index], device=square.device)).detach()
        yield Explanation(
            answer(
                dataset.ids[row],
                probabilities[row],
                float(unknown[row]),
                classes=bundle.classes,
                task=bundle.task,
                threshold=bundle.threshold,
            ),
            target=bundle.classes[index],
            probability=float(probabilities[row, index]),
            map=placed(found[0].float().cpu().numpy(), photo.size, bundle.preprocessing),
            scores=judged(scorer, open_model, square, found[0], index) if score else None,
            notes=tuple(dict.fromkeys(str(each.message) for each in caught)),
            seconds=time.perf_counter() - start,
            photo=photo,
            seen=seen_box(photo.size, bundle.preprocessing),
        )
        if progress:
            progress((row + 1) * each, each * len(dataset))


def chosen(choice: str) -> Explain:
    method = catalogue.create(choice)
    if not isinstance(method, Explain):
        raise UsageError(
            f"{method.name} is a method of family {method.spec.family}: expected one that explains, "
            f"{' or '.join(catalogue.names('explain'))}"
        )
    return method


def class_index(bundle: Bundle, name: str) -> int:
    if name in bundle.classes:
        return bundle.classes.index(name)
    near = get_close_matches(name, bundle.classes, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(bundle.classes[:20])}"
    raise UsageError(f"the Bundle has no class '{name}': {hint}")


def open_model_of(bundle: Bundle, device: str) -> OpenModel:
    """The Bundle's torch model: logits over temperature, as the probabilities are made from."""
    model = bundle.model.to(pick_device(device))
    return OpenModel(model, bundle.preprocessing, answer=lambda images: model.classifier(images) / model.temperature)


def scorer_of(bundle: Bundle, device: str) -> Scorer:
    """The Bundle's probabilities by the fastest way: a feature session where the head reads plain features."""
    model = bundle.model
    classifier: Any = model.classifier
    if type(classifier) is not Classifier or not isinstance(classifier.backbone, Backbone):
        return OpenModel(model, bundle.preprocessing, answer=lambda images: model(images)[0])
    return feature_scorer(
        classifier.backbone, lambda features: model.judge(features, classifier.head(features))[0], device=device
    )


def squares(photo: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """What the model sees of a photo, [1, 3, S, S] in [0, 1]."""
    pixels = np.array(to_pixels(photo, preprocessing))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def placed(map: np.ndarray, size: tuple[int, int], preprocessing: Preprocessing) -> np.ndarray:
    """A map [S, S] of the square -> float32 [H, W] of the photo of `size` (width, height), 0 outside of the square."""
    left, top, right, bottom = seen_box(size, preprocessing)
    whole = np.zeros((size[1], size[0]), np.float32)
    x0, y0 = round(left), round(top)
    x1, y1 = max(x0 + 1, round(right)), max(y0 + 1, round(bottom))
    across, down = map.shape[1] / (right - left), map.shape[0] / (bottom - top)
    box = ((x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down)
    low, high = [max(0.0, edge) for edge in box[:2]], [min(map.shape[1 - i], box[2 + i]) for i in (0, 1)]
    image = Image.fromarray(np.ascontiguousarray(map, np.float32))
    scaled = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, (low[0], low[1], high[0], high[1]))
    whole[y0:y1, x0:x1] = np.asarray(scaled)[: size[1] - y0, : size[0] - x0]
    return whole


def judged(scorer: Scorer, open_model: OpenModel, square: Tensor, map: Tensor, index: int) -> dict[str, Any]:
    """Deletion and insertion of a map, on the probability of the explained class."""
    try:
        features = open_model.feature_map(square)[0]
    except (BackboneError, UsageError):  # no map to take the channel norm of
        features = None
    return explanation.judge(
        lambda images: scorer.of(images, torch.full((len(images),), index, device=images.device)),
        square[0],
        map,
        scorer.neutral,
        features=features,
        batch=scorer.batch,
    )
