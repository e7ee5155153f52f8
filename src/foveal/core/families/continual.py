"""The continual family: a classifier and images of new classes -> a classifier of both, without being told which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.method import Classifier, Recipe, Trained


@dataclass(frozen=True)
class Stage:
    """One round of training in an update.

    Attributes:
        balanced: every class with as many images as the memory holds of an old one; otherwise all new images beside
            the memory.
    """

    name: str
    recipe: Recipe
    balanced: bool = False


class Continual(Trained):
    """A classifier that knows C_old classes, and images of C_new others beside a memory of the old.

    The order of the classes stays: old ones first. `foveal.train.stream` runs an update: `grow`, then for each of
    `stages` the loop trains what `update` gives, and `finish` takes the classifier out of it.
    """

    def grow(self, model: Classifier, classes: int) -> Classifier:
        """A copy of the model with room for `classes` more: its logits [B, C_old + classes] begin with those of the
        model, bit by bit. Random numbers come from torch's global generator.

        Raises:
            UsageError: no class to add, or a model that cannot grow.
        """
        raise UsageError(f"{self.name} does not add classes")

    def stages(self) -> tuple[Stage, ...]:
        """Rounds of training, in order."""
        return (Stage("learn", self.recipe()),)

    def update(self, old: Classifier, grown: Classifier, stage: Stage) -> nn.Module:
        """What the loop trains in a stage: the grown model, and beside it whatever only training needs (a frozen copy
        of the old one to distil from, throw-away heads). Its batches are as `given` says, with `labels` [B]."""
        raise UsageError(f"{self.name} does not learn from a stream")

    def given(self, grown: Classifier, images: Tensor) -> Mapping[str, Tensor] | None:
        """What no stage changes, computed once for each of images [B, 3, H, W] (normalised) and given to `loss` in
        their place; None when training needs the images themselves."""
        return None

    def finish(self, model: Any) -> Classifier:
        return model

    def plan(self, old: Classifier, grown: Classifier) -> dict[str, Any]:
        """Plain data from which `rebuild` makes a model like `grown` from one like `old`."""
        raise UsageError(f"{self.name} keeps no plan")

    def added(self, plan: Mapping[str, Any]) -> int:
        """How many classes a plan adds.

        Raises:
            UsageError: not a plan that `plan` makes.
        """
        raise UsageError(f"{self.name} keeps no plan")

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        """The structure of a grown model, to load weights into. The plan may come from a stranger.

        Raises:
            UsageError: not a plan that `plan` makes.
        """
        raise UsageError(f"{self.name} keeps no plan")
