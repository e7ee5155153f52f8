"""How good the predictions are, and how sure we can be of it: every metric with its bootstrap interval.

A resample of n images with replacement is a column of multiplicities (how often each image was drawn). Every
metric is written for such columns, so all resamples are computed at once, and the metric itself is the same code
on a column of ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveal.core.errors import DataError, FovealError
from foveal.core.method import Task
from foveal.core.seeds import generator

Array = NDArray[Any]

BINS = 15
CONFIDENCE = 0.95
CHUNK = 1_000_000
"""Multiplicities held at once (4 MB)."""
WORK = 100_000_000
"""Sorted multiplicities per call; above it (many classes and many images) AUROC takes fewer resamples, 100 at least."""


def measure(
    probabilities: Array,
    labels: Array,
    classes: Sequence[str],
    task: Task,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Every metric, with its 95% percentile bootstrap interval over images.

    Args:
        probabilities: [n, C] in 0..1; rows sum to 1 when single-label.
        labels: [n] class indices, or [n, C] of 0 and 1 when multi-label.
        classes: C names.
        seed: of the resamples; the same seed gives the same intervals.
        resamples: bootstrap resamples; 0 gives no intervals (low = high = None).

    Returns:
        A dict ready for JSON (None, never NaN, where a metric is undefined). `accuracy`, `balanced_accuracy`,
        `macro_f1`, `auroc`, `ece` (and `map` when multi-label) are `{"value", "low", "high"}`, beside `n`, `task`,
        `per_class` (precision, recall with its interval, f1, auroc, support), `confusion` (single-label; rows are
        the true classes) and `notes` (what was left out, in sentences).

        Single-label: `balanced_accuracy` is the mean recall of the classes that have images, `macro_f1` is over
        the classes that occur in labels or predictions, `auroc` is binary, or the mean of one-vs-rest over classes
        that have images.  Multi-label, at a threshold of 0.5: `accuracy` asks for every label of the image to be
        right, `balanced_accuracy` is the mean over labels of (TPR + TNR) / 2.  `ece`: see `calibration_gaps`.

    Raises:
        DataError: no images, or shapes that do not fit each other.
        FovealError: probabilities that are not finite (a model that diverged).
    """
    multi = task == "multi-label"
    P, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    check_shapes(P, y, classes, task)
    n, C = P.shape

    true = y.astype(bool) if multi else y[:, None] == np.arange(C)
    guess = P >= 0.5 if multi else P.argmax(1)[:, None] == np.arange(C)
    gaps = np.hstack(calibration_gaps(P, y, task))
    parts = (true, guess, true & guess, (true == guess).all(1)[:, None], gaps)
    ends = np.cumsum([part.shape[1] for part in parts])
    columns = np.hstack([part.astype(np.float32) for part in parts])
    ranked = range(C) if multi or C > 2 else [1]
    orders = {c: ranking(P[:, c]) for c in ranked}
    ranked_resamples = int(np.clip(WORK // (n * len(orders)), min(100, resamples), resamples))

    def metrics(W: Array, with_ranks: bool = True) -> dict[str, Array]:
        """Multiplicities [n, R] -> arrays [R] and [C, R]."""
        support, guessed, hits, right, gap, _ = np.split(columns.astype(W.dtype, copy=False).T @ W, ends)
        total = W.sum(0)
        recall, precision = ratio(hits, support), ratio(hits, guessed)
        f1 = ratio(2 * hits, support + guessed)
        specificity = ratio(total - support - guessed + hits, total - support)
        out = {
            "accuracy": right[0] / total,
            "balanced_accuracy": mean_of(mean_of(np.stack([recall, specificity])) if multi else recall),
            "macro_f1": mean_of(f1),
            "ece": np.abs(gap).sum(0) * (BINS / len(gap)) / total,
            "recall": recall,
            "precision": precision,
            "f1": f1,
        }
        if with_ranks:
            areas = [ranked_sums(orders[c], true[:, c], W) for c in ranked]
            out["class_auroc"] = np.stack([auroc_of(*sums) for sums in areas])
            out["auroc"] = mean_of(out["class_auroc"])
            if multi:
                out["class_ap"] = np.stack([average_precision_of(*sums) for sums in areas])
                out["map"] = mean_of(out["class_ap"])
        return out

    point = {name: value[..., 0] for name, value in metrics(np.ones((n, 1))).items()}
    drawn: dict[str, list[Array]] = {name: [] for name in point}
    done = 0
    for W in multiplicities(n, resamples, seed):
        for name, value in metrics(W, with_ranks=done < ranked_resamples).items():
            drawn[name].append(value)
        done += W.shape[1]

    def with_interval(name: str) -> dict[str, float | None]:
        value = number(point[name])
        if not drawn[name] or value is None:
            return {"value": value, "low": None, "high": None}
        samples = np.concatenate(drawn[name], axis=-1).astype(np.float64)
        if name == "ece":
            # A resample adds its own noise to every bin, so resampled errors lie above the estimate: move them back.
            samples = np.clip(samples - samples.mean() + value, 0.0, 1.0)
        low, high = interval(samples)
        return {"value": value, "low": number(low), "high": number(high)}

    names = ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", *(["map"] if multi else [])]
    report: dict[str, Any] = {"n": n, "task": task, **{name: with_interval(name) for name in names}}
    lows, highs = np.full((2, C), np.nan)
    if drawn["recall"]:
        lows, highs = interval(np.concatenate(drawn["recall"], axis=-1).astype(np.float64))
    by_class = dict(zip(ranked, point["class_auroc"], strict=True))
    report["per_class"] = {
        name: {
            "precision": number(point["precision"][c]),
            "recall": number(point["recall"][c]),
            "recall_low": number(lows[c]),
            "recall_high": number(highs[c]),
            "f1": number(point["f1"][c]),
            "auroc": number(by_class.get(c, point["auroc"])),
            **({"average_precision": number(point["class_ap"][c])} if multi else {}),
            "support": int(true[:, c].sum()),
        }
        for c, name in enumerate(classes)
    }
    if not multi:
        cells = np.bincount(y.astype(np.int64) * C + P.argmax(1), minlength=C * C)
        report["confusion"] = cells.reshape(C, C).tolist()
    report["notes"] = left_out(true, classes)
    report["bootstrap"] = {"resamples": resamples, "confidence": CONFIDENCE, "seed": seed}
    if ranked_resamples < resamples:
        report["bootstrap"]["auroc_resamples"] = sum(part.shape[-1] for part in drawn["auroc"])
    return report


def check_shapes(P: Array, y: Array, classes: Sequence[str], task: Task) -> None:
    expected = P.shape if task == "multi-label" else P.shape[:1]
    if P.ndim != 2 or not len(P):
        raise DataError(f"metrics need probabilities of at least one image, [n, C]: got shape {list(P.shape)}")
    if y.shape != expected or P.shape[1] != len(classes):
        raise DataError(
            f"probabilities {list(P.shape)}, labels {list(y.shape)} and {len(classes)} classes do not fit each other: "
            f"expected [n, C], {'[n, C]' if task == 'multi-label' else '[n]'} and C names"
        )
    if task == "single-label" and (y.min() < 0 or y.max() >= len(classes)):
        raise DataError(f"labels {int(y.min())}..{int(y.max())} do not fit {len(classes)} classes: expected 0..C-1")
    if wrong := int((~np.isfinite(P)).any(1).sum()):
        raise FovealError(
            f"{wrong} of {len(P)} images have probabilities that are not finite: the model diverged, "
            "fit again with a lower learning rate"
        )


def calibration_gaps(P: Array, y: Array, task: Task, bins: int = BINS) -> list[Array]:
    """Terms whose absolute column sums, over n, add up to the expected calibration error (Guo et al. 2017, eq. 3).

    Bins have equal width and hold [k/bins, (k+1)/bins), the last one 1.0 too. Single-label: one term, of the
    confidence of the top label against being right. Multi-label: a term per class, of its probability against its
    label; the error is their mean.

    Returns:
        A list of [n, bins].
    """
    if task == "multi-label":
        pairs = [(P[:, c], y[:, c].astype(np.float64)) for c in range(P.shape[1])]
    else:
        pairs = [(P.max(1), (P.argmax(1) == y).astype(np.float64))]
    gaps = []
    for confidence, outcome in pairs:
        gap = np.zeros((len(P), bins))
        gap[np.arange(len(P)), bin_of(confidence, bins)] = confidence - outcome
        gaps.append(gap)
    return gaps


def bin_of(confidence: Array, bins: int) -> Array:
    edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    return np.searchsorted(edges, confidence, side="right")


def ranking(scores: Array) -> tuple[Array, Array]:
    """Images in order of falling score, and where each run of equal scores starts."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def ranked_sums(ranked: tuple[Array, Array], positive: Array, W: Array) -> tuple[Array, Array]:
    """Summed multiplicities of positives and of negatives in runs of images by falling score, [runs, R] each.

    Images of one score share a run; so do negatives with no positive between them.

    Args:
        ranked: from `ranking`.
        positive: bool [n].
        W: multiplicities [n, R].
    """
    order, starts = ranked
    hit = positive[order]
    if not hit.any():
        total = W.sum(0, keepdims=True)
        return np.zeros_like(total), total
    shared = np.logical_or.reduceat(hit, starts)
    runs = starts[shared | np.r_[True, shared[:-1]]]
    weights = W[order]
    both = np.add.reduceat(weights, runs, axis=0)
    rows, first = np.unique(np.searchsorted(runs, np.flatnonzero(hit), side="right") - 1, return_index=True)
    good = np.zeros_like(both)
    good[rows] = np.add.reduceat(weights[hit], first, axis=0)
    return good, both - good


def auroc_of(good: Array, bad: Array) -> Array:
    """Area under the ROC curve [R] from `ranked_sums`, ties counting one half; NaN without positives or negatives."""
    above = np.cumsum(bad, axis=0)
    negatives = above[-1]
    wins = np.einsum("gr,gr->r", good, negatives - above + bad / 2)
    return ratio(wins, good.sum(0).astype(np.float64) * negatives)


def average_precision_of(good: Array, bad: Array) -> Array:
    """Average precision [R] from `ranked_sums` (sum of precision times step in recall); NaN without positives."""
    found = np.cumsum(good, axis=0)
    precision = found / np.maximum(found + np.cumsum(bad, axis=0), 1)
    return ratio(np.einsum("gr,gr->r", good, precision), found[-1])


def auroc(scores: Array, positive: Array) -> float:
    """Area under the ROC curve of one score [n] for bool [n]; NaN when one side is empty."""
    sums = ranked_sums(ranking(np.asarray(scores)), np.asarray(positive, dtype=bool), np.ones((len(scores), 1)))
    return float(auroc_of(*sums)[0])


def multiplicities(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Chunks [n, R] of how often each image is drawn in each resample, float32, at most `CHUNK` numbers each."""
    rng = generator(seed, "bootstrap")
    step = max(1, CHUNK // n)
    for first in range(0, resamples, step):
        R = min(step, resamples - first)
        drawn = rng.integers(0, n, (R, n), dtype=np.int32)
        drawn += (np.arange(R, dtype=np.int64) * n).astype(np.int32)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=R * n).reshape(R, n)
        yield np.ascontiguousarray(counts.T, dtype=np.float32)


def ratio(above: Array, below: Array) -> Array:
    """above / below, NaN where below is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def mean_of(values: Array) -> Array:
    """Mean over the first axis of what is defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=0)


def interval(samples: Array) -> tuple[Array, Array]:
    """The central 95% of what is defined along the last axis (linear interpolation)."""
    ordered = np.sort(samples, axis=-1)
    last = np.maximum((~np.isnan(samples)).sum(-1) - 1, 0)
    ends = []
    for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        place = share * last
        under = np.floor(place).astype(int)
        over = np.minimum(under + 1, last)
        low, high = (np.take_along_axis(ordered, at[..., None], -1)[..., 0] for at in (under, over))
        ends.append(low + (high - low) * (place - under))
    return ends[0], ends[1]


def number(value: Any) -> float | None:
    """A float for JSON: None instead of NaN."""
    return float(value) if np.isfinite(value) else None


def left_out(true: Array, classes: Sequence[str]) -> list[str]:
    """Sentences about classes that some metrics cannot judge."""
    support = true.sum(0)
    notes = []
    if absent := [name for name, images in zip(classes, support, strict=True) if images == 0]:
        notes.append(f"no image of {', '.join(absent)}: left out of balanced accuracy and AUROC")
    if full := [name for name, images in zip(classes, support, strict=True) if images == len(true)]:
        notes.append(f"every image is {', '.join(full)}: AUROC cannot be judged for it")
    return notes
