"""How well a stream of classes was learnt and kept: accuracies over time, forgetting, and how far old answers moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def drift(before: Tensor, after: Tensor) -> dict[str, Any]:
    """How far the answers to old images moved: logits [n, C_old] of the model before, [n, C] of the one after.

    `moved` is the largest change of an old logit, `moved_mean` the mean, `equal` whether all are equal bit by bit;
    `altered` is the share of images whose best old class is another, `taken` of those now given a new class.
    """
    count = before.shape[1]
    kept = after[:, :count]
    return {
        "moved": float((kept - before).abs().max()),
        "moved_mean": float((kept - before).abs().mean()),
        "equal": bool(torch.equal(kept, before)),
        "altered": float((kept.argmax(1) != before.argmax(1)).double().mean()),
        "taken": float((after.argmax(1) >= count).double().mean()),
    }


def summary(correct: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
    """Of a stream of T batches of classes.

    Args:
        correct: `correct[t][i]`, i <= t: whether each test image of batch i was answered right by the model after
            batch t, which was not told that it is of batch i.

    Returns:
        `last`: accuracy over all images at the end; `average`: of that accuracy after each batch, the mean;
        `forgetting`: how much lower a batch's accuracy is at the end than at its best, the mean over all but the last
        (Chaudhry et al. 2018).
    """
    over_all = [float(np.concatenate(list(row)).mean()) for row in correct]
    of_batch = [[float(each.mean()) for each in row] for row in correct]
    last = len(of_batch) - 1
    lost = [max(of_batch[t][i] for t in range(i, last)) - of_batch[last][i] for i in range(last)]
    return {
        "last": over_all[-1],
        "average": float(np.mean(over_all)),
        "forgetting": float(np.mean(lost)) if lost else 0.0,
    }


def kept_and_learnt(
    before: tuple[Tensor, Tensor] | None, after: Tensor, labels: Tensor, classes: Sequence[str], known: int
) -> dict[str, Any]:
    """Accuracy of the first `known` classes before and after an update, of the others after it, and of each class.

    Args:
        before: logits [m, known] of the model before for old test images, and their labels [m].
        after: logits [n, C] for all test images. labels: [n].

    Returns:
        `old_before`, `old_after` (over all classes), `new_after`, `forgetting` (of the mean recall of old classes), and
        `per_class`: rows of name, new, n, before, after (recall). None where there are no images.
    """
    said = after.argmax(1)
    then = None if before is None else before[0].argmax(1)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(classes):
        own = labels == index
        old = None if then is None or before is None or index >= known else recall(then, before[1], index)
        rows.append(
            {
                "name": name,
                "new": index >= known,
                "n": int(own.sum()),
                "before": old,
                "after": recall(said, labels, index),
            }
        )
    pairs = [(row["before"], row["after"]) for row in rows if row["before"] is not None and row["after"] is not None]
    return {
        "old_before": None if then is None or before is None else share(then == before[1]),
        "old_after": share((said == labels)[labels < known]),
        "new_after": share((said == labels)[labels >= known]),
        "forgetting": float(np.mean([old - new for old, new in pairs])) if pairs else None,
        "per_class": rows,
    }


def recall(said: Tensor, labels: Tensor, index: int) -> float | None:
    return share((said == labels)[labels == index])


def share(right: Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None
