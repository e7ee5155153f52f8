"""Distill: a frozen teacher beside the student that trains, and a loss that is a sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from foveal.core.errors import DataError, UsageError
from foveal.core.method import Adapt, Classifier, classification_loss


@dataclass(frozen=True)
class Term:
    """One summand of a distillation loss: `weight * loss(view)`.

    A view is what the networks answered for the chosen rows of a batch: what `foveal.backbones.pair.Pair` gives, with
    `labels` and `class_weights`; `logits` are those of the chosen head.

    Attributes:
        name: under which the loop records it.
        rows: 'labelled', or 'all' with the unlabelled ones.
        head: whose classifier reads the student. Through the teacher's, gradients reach the student's layers and
            neither classifier.
    """

    name: str
    loss: Callable[[Mapping[str, Tensor]], Tensor]
    weight: float = 1.0
    rows: Literal["labelled", "all"] = "all"
    head: Literal["student", "teacher"] = "student"


CROSS_ENTROPY = Term("cross_entropy", lambda view: classification_loss(view["logits"], view), rows="labelled")
"""The labels, read by the student's own classifier."""


class Distill(Adapt):
    """Teacher + images, some of them labelled -> a student: a classifier of its own, alone in the end.

    `attach` makes the student. What the loop trains is the `pair`; `finish` takes the student out of it again.
    """

    def pair(self, student: Classifier, teacher: Classifier | None) -> Any:
        """A `foveal.backbones.pair.Pair` of both, with whatever is between them only while they train.

        Args:
            teacher: in eval mode; never changed. None: the student learns from the labels alone.
        """
        raise UsageError(f"{self.name} pairs no student with a teacher")

    def terms(self) -> list[Term]:
        """What the loss is the sum of. Terms of weight 0 are not computed."""
        return [CROSS_ENTROPY]

    def alone(self) -> Distill:
        """This method with the same recipe and the labels as its only term: what a teacher's worth is measured
        against."""
        raise UsageError(f"{self.name} cannot train without a teacher")

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum of the terms as 'loss', and each term unweighted.

        `batch` has images [B, 3, H, W], labels [B] or [B, C], labelled [B] (bool; the labels of other rows mean
        nothing), class_weights [C], and teacher_images [B, 3, h, w] unless there is no teacher.

        Raises:
            DataError: a label that the student has no class for.
        """
        seen = model(batch["images"], batch.get("teacher_images"))
        check_labels(batch["labels"], seen["logits"].shape[1])
        seen["labels"] = batch["labels"]
        parts: dict[str, Tensor] = {}
        total = seen["logits"].new_zeros(())
        for term in self.terms():
            if term.weight == 0:
                continue
            view = chosen(seen, batch["labelled"]) if term.rows == "labelled" else dict(seen)
            if not len(view["labels"]):
                continue
            view["class_weights"] = batch["class_weights"]
            if term.head == "teacher":
                view["logits"] = view["crossed_logits"]
            parts[term.name] = term.loss(view)
            total = total + term.weight * parts[term.name]
        return {"loss": total, **parts}

    def finish(self, model: Any) -> Classifier:
        """The student of a trained pair; a student that is already alone is given back as it is.

        Raises:
            FovealError: the teacher changed while the student learnt.
        """
        return model if isinstance(model, Classifier) else model.take_student()


def chosen(seen: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The rows of every answer where `rows` [B] is true."""
    return dict(seen) if bool(rows.all()) else {name: value[rows] for name, value in seen.items()}


def check_labels(labels: Tensor, classes: int) -> None:
    found = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    if found > classes or (labels.ndim == 2 and found != classes):
        raise DataError(
            f"labels of {found} classes for a student of {classes}: expected a student made for the classes of the data"
        )
