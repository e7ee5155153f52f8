"""Shrink and accelerate: a classifier in, one that costs less out, and the plan from which its structure is rebuilt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from foveal.core.errors import UsageError
from foveal.core.method import Classifier, Method

Quantity = Literal["params", "macs", "latency", "size"]
"""What a target speaks of: numbers in the model, multiply-accumulates of an image, milliseconds of an image in ONNX
Runtime, bytes of the weights as they are stored."""
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


@dataclass(frozen=True)
class Target:
    """How much of a quantity may be left, as a share in (0, 1) of what the model had before the first step.

    Attributes:
        measure: classifier -> its share of that quantity now. Parameters, MACs and size are exact; latency is timed.
    """

    quantity: Quantity
    share: float
    measure: Callable[[Classifier], float]


class TaskData(ABC):
    """Labelled training images of the model's task, and what the caller does for a method with them."""

    @abstractmethod
    def batches(self, images: int, size: int) -> Iterator[Mapping[str, Tensor]]:
        """Up to `images` training images in batches of `size`, the same at every call: images [B, 3, H, W]
        (normalised), labels [B] or [B, C], class_weights [C]."""

    @abstractmethod
    def tune(self, model: Classifier, steps: int, lr: float) -> Classifier:
        """`model` after so many optimiser steps on the task, every parameter that asks for a gradient learning."""

    @abstractmethod
    def progress(self, done: int, total: int) -> None:
        """Tells how far a method is."""


@dataclass(frozen=True)
class Shrunk:
    """What a step made.

    Attributes:
        module: the classifier; state is parameters and buffers only.
        plan: JSON that suffices for `rebuild`. It may come back from a stranger's Bundle.
        notes: what is worth telling of the step, by name; JSON.
    """

    module: Classifier
    plan: dict[str, Any]
    notes: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())


class Shrink(Method):
    """Classifier [+ labelled images] -> a smaller classifier with the same inputs and outputs."""

    targets: ClassVar[tuple[Quantity, ...]] = ()
    """What this method can be given a target of. Without a target its options say how far to go."""

    def shrink(self, model: Classifier, data: TaskData | None, target: Target | None) -> Shrunk:
        """A smaller classifier. `model` is in eval mode and stays as it is, with nothing left hanging on it.

        Raises:
            UsageError: no data where the method needs them, or a target out of reach.
            BackboneError: nothing in this architecture that the method could shrink.
        """
        raise UsageError(f"{self.name} shrinks nothing")

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        """The structure that `shrink` gave, its weights to be loaded afterwards. `model`, of the structure that
        `shrink` got, belongs to this call. A plan only ever makes a model smaller, or names what is there.

        Raises:
            UsageError: a plan that `shrink` did not write for this structure.
        """
        raise UsageError(f"{self.name} rebuilds nothing")

    def codes(self, model: Classifier) -> list[tuple[Any, Any]]:
        """Weights that are products of integers and a scale per channel: pairs (float32 array [out, ...],
        `foveal.blocks.codes.Codes`). An int8 export takes these codes as they are."""
        return []


class Accelerate(Shrink):
    """The same hooks for a method that keeps the weights and does less with them, such as with fewer tokens, or does as
    much in fewer steps; the second kind has no `targets` and no other budgets."""

    def frontier(self, model: Classifier) -> dict[str, Classifier]:
        """What this method makes of `model` at other budgets, by a name for each, from dear to cheap. The report plots
        what each costs and answers."""
        return {}
