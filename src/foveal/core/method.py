"""What a method is: a Spec, frozen Options, and the few hooks of its family.

A method holds its options and nothing else; what it learns lives in the `nn.Module` it returns, as
parameters and buffers. It never sees a device, a loop, a file or another method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.core.errors import UsageError
from foveal.core.options import options, options_to_dict
from foveal.core.task import OtherTask, Task

Need = Literal["labels", "tokens", "attention", "gradients", "text", "teacher", "feature map"]


@dataclass(frozen=True)
class Spec:
    """What a method is and needs; written once, beside the class.

    `needs` lists what the method cannot do without: 'labels', 'tokens' (a transformer's token sequence),
    'attention' (self-attention blocks), 'gradients' (through the backbone), 'text', 'teacher', 'feature map' (a layer
    with a spatial extent). An explanation that needs nothing asks for scores alone, and so works on any model.
    """

    family: str
    title: str
    year: int
    arxiv: str | None
    needs: frozenset[Need] = field(default_factory=lambda: frozenset[Need]({"labels"}))
    tasks: tuple[Task | OtherTask, ...] = ("single-label",)


@options
class NoOptions:
    """For a method that has nothing to set."""


class Method:
    """Base of every method. Subclasses are registered by `@method(Spec(...), Options)`."""

    spec: ClassVar[Spec]
    name: ClassVar[str]
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise UsageError(f"{self.name} takes its own Options, not {type(options).__name__}")

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in options_to_dict(self.options).items())
        return f"{type(self).__name__}({given})"


M = TypeVar("M", bound=Method)


def method(spec: Spec, options: type[Any] = NoOptions) -> Callable[[type[M]], type[M]]:
    """Class decorator: gives a method its Spec, its Options and the name of its file."""

    def register(cls: type[M]) -> type[M]:
        cls.spec, cls.Options = spec, options
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        return cls

    return register


class Classifier(nn.Module):
    """A backbone and a head: images [B, 3, H, W] (normalised) -> logits [B, C].

    Softmax (single-label) or sigmoid (multi-label) of the logits are the probabilities. Methods that change
    how features are made subclass it and override `features`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def width(self) -> int:
        """D, how many numbers the head reads."""
        backbone: Any = self.backbone
        return backbone.width

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> pooled features [B, D], what the head reads."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class Recipe:
    """How the loop trains a method: what an optimiser needs to know, and nothing about devices."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.1
    """Share of all steps over which the rate rises linearly; it then falls as a cosine."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    augment: Literal["none", "light", "strong"] = "light"
    label_smoothing: float = 0.0


class Trained(Method):
    """A method that the loop trains: how, with which loss, and what to do after a step and at the end.

    What is trained is any module; what a batch holds is up to the `Feed` it comes from.
    """

    def recipe(self) -> Recipe:
        """How the loop should train: the options that have a Recipe field's name."""
        chosen = options_to_dict(self.options)
        return Recipe(**{field.name: chosen[field.name] for field in fields(Recipe) if field.name in chosen})

    def parameter_groups(self, model: Any, recipe: Recipe) -> list[dict[str, Any]]:
        """Optimiser groups: no weight decay on vectors (biases, norms), by default."""
        decay = [p for _, p in trainable(model) if p.ndim > 1]
        plain = [p for _, p in trainable(model) if p.ndim <= 1]
        groups = [
            {"params": decay, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
            {"params": plain, "lr": recipe.lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch: 'loss', the mean over its examples, and any parts worth plotting."""
        raise UsageError(f"{self.name} has no loss: it is not trained")

    def after_step(self, model: Any, step: int) -> None:
        """Called after each optimiser step."""

    def finish(self, model: Any) -> Any:
        """Trained module -> the one to keep (merge adapters, drop what only training needs)."""
        return model


class Adapt(Trained):
    """Backbone + labelled images -> classifier.

    A method that reads frozen features overrides `fit_features` (and `head`, when its head is not an
    `nn.Linear`). A method that trains through the backbone overrides `attach`.
    """

    def fit_features(self, X: Tensor, y: Tensor, weights: Tensor, seed: int) -> nn.Module:
        """Frozen features -> head.

        Args:
            X: features [n, D], float32. Never changed.
            y: labels [n] int64, or [n, C] of 0 and 1 for several labels per image.
            weights: one positive weight per image [n]; mean 1. Carries class weights.
            seed: for inner splits and initialisation.

        Returns:
            A module [B, D] -> logits [B, C] whose state is parameters and buffers only.
        """
        raise UsageError(f"{self.name} does not work on frozen features")

    def head(self, shapes: Mapping[str, torch.Size]) -> nn.Module:
        """An empty head of the shape `fit_features` returned, for loading its state dict."""
        classes, width = shapes["weight"]
        return nn.Linear(width, classes, bias="bias" in shapes)

    def attach(self, backbone: Any, classes: int) -> Classifier:
        """Backbone -> trainable classifier. `backbone` belongs to the caller's model from here on: freeze by
        `requires_grad_(False)`, add modules, but call nothing of its trainer."""
        raise UsageError(f"{self.name} does not train through the backbone")

    def loss(self, model: Classifier, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of one batch: 'loss', and any parts worth plotting.

        `batch` has images [B, 3, H, W], labels [B] or [B, C], and class_weights [C].
        """
        return {"loss": classification_loss(model(batch["images"]), batch, self.recipe().label_smoothing)}

    @classmethod
    def reads_features(cls) -> bool:
        """Whether this method fits a head on frozen features, rather than training through the backbone."""
        return cls.fit_features is not Adapt.fit_features


class Explain(Method):
    """Model + images + classes -> heat maps.

    `model` is a `foveal.backbones.wrapper.Scorer`, or an `OpenModel` for a method that needs gradients or a feature
    map. What a method hangs on it, it takes off again; images never change.
    """

    def explain(self, model: Any, images: Tensor, target: Tensor) -> Tensor:
        """Heat maps [B, H, W], finite, the higher the more a pixel matters; on the images' device.

        Args:
            model: images -> scores [B, C], which hands the network at most `model.batch` images at once.
            images: [B, 3, H, W] in [0, 1], each the square the model sees.
            target: the class to explain for each image [B], int64.
        """
        raise UsageError(f"{self.name} makes no heat maps")

    def passes(self) -> int:
        """How many images the network sees for each one explained."""
        return 1

    def on(self, model: Any) -> Attribution:
        """This method on one model, called as captum's attribution classes are."""
        return Attribution(self, model)


@dataclass(frozen=True)
class Attribution:
    """`SobolAttribution().on(model).attribute(inputs, target=281)`."""

    method: Explain
    model: Any

    def attribute(self, inputs: Tensor, target: int | Tensor | None = None) -> Tensor:
        """Attributions of the shape of `inputs` [B, 3, H, W] (in [0, 1]); a pixel's channels share its value.

        Args:
            target: one class, or one for each image [B]; None: the class with the highest score.

        Raises:
            UsageError: neither one target nor as many as images.
        """
        if target is None:
            with torch.no_grad():
                classes = self.model(inputs).argmax(1)
        else:
            classes = torch.as_tensor(target, device=inputs.device).reshape(-1)
            if len(classes) not in (1, len(inputs)):
                raise UsageError(f"{len(classes)} targets for {len(inputs)} images: expected one, or one for each")
            classes = classes.expand(len(inputs))
        return self.method.explain(self.model, inputs, classes)[:, None].expand_as(inputs)


def classification_loss(logits: Tensor, batch: Mapping[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    """Class-weighted cross-entropy for labels [B]; binary cross-entropy, summed over classes, for [B, C].

    The single-label form divides by the batch size, not by the sum of weights, so the weight of an image does
    not depend on its neighbours in the batch.
    """
    labels, weights = batch["labels"], batch["class_weights"].to(logits.dtype)
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weights)
    per_image = F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=label_smoothing)
    return per_image.mean()


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tensors that training may change."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
