"""The model that explanations, attacks and counterfactuals look at: images in [0, 1] in, scores out.

It owns what such methods get wrong: the range of the images, the normalisation, eval mode, parameters that must not
move, and how many images reach the network at once. `Scorer` is a closed box, any function of images; `OpenModel`
has a torch module inside, whose layers can be read and through which gradients flow to the images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone
from foveal.backbones.recorder import find, recording
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing

BATCH = 32
SLACK = 1e-4
"""How far outside of [0, 1] rounding may leave an image."""


class Scorer:
    """Images [B, 3, H, W] in [0, 1] -> scores [B, C].

    Attributes:
        neutral: the colour [3, 1, 1] that the network reads as nothing: zero after normalisation.
        batch: the most images that reach `score` at once, unless gradients are asked for.
    """

    def __init__(
        self, score: Callable[[Tensor], Tensor], neutral: Sequence[float] = (0.5, 0.5, 0.5), batch: int = BATCH
    ) -> None:
        """
        Args:
            score: [B, 3, H, W] in [0, 1] -> [B, C], logits or probabilities: what is explained is what it gives.
        """
        self.score = score
        self.neutral = torch.tensor([float(value) for value in neutral]).reshape(3, 1, 1)
        self.batch = batch

    def __call__(self, images: Tensor) -> Tensor:
        """
        Raises:
            DataError: the images are not float [B, 3, H, W] in [0, 1].
            UsageError: the scores are not [B, C], or not numbers.
        """
        check_images(images)
        if images.requires_grad and torch.is_grad_enabled():
            scores = self.score(images)
        else:
            scores = torch.cat([self.score(part) for part in images.split(self.batch)])
        return check_scores(scores, len(images))

    def of(self, images: Tensor, target: Tensor) -> Tensor:
        """The scores [B] of the classes `target` [B].

        Raises:
            UsageError: a class that the model does not have; and as `__call__`.
        """
        scores = self(images)
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= scores.shape[1]:
            wrong = low if low < 0 else high
            raise UsageError(f"target {wrong}: the model has {scores.shape[1]} classes, 0 to {scores.shape[1] - 1}")
        return scores.gather(1, target[:, None].to(scores.device))[:, 0]


class OpenModel(Scorer):
    """A torch module behind the same call, with its layers and gradients.

    Attributes:
        module: where layers are looked up.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        answer: Callable[[Tensor], Tensor] | None = None,
        batch: int = BATCH,
    ) -> None:
        """
        Args:
            module: in eval mode; reads normalised images. Its parameters and mode are as before after every call.
            preprocessing: whose mean and deviation are applied here.
            answer: normalised images -> scores [B, C]; default: the module itself.

        Raises:
            UsageError: the module is in training mode.
        """
        super().__init__(self._score, preprocessing.mean, batch)
        self.module, self.answer = module, answer or module
        self.preprocessing = preprocessing
        check_mode(module)

    def _score(self, images: Tensor) -> Tensor:
        check_mode(self.module)
        with frozen(self.module):
            return self.answer(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(each, dtype=images.dtype, device=images.device).reshape(3, 1, 1)
            for each in (self.preprocessing.mean, self.preprocessing.std)
        )
        return (images - mean) / std

    @property
    def device(self) -> torch.device:
        return next((each.device for each in self.module.parameters()), torch.device("cpu"))

    @property
    def backbone(self) -> Backbone | None:
        """The backbone in the module, if it has one."""
        return next((each for each in self.module.modules() if isinstance(each, Backbone)), None)

    def layer(self, name: str = "") -> str:
        """The full name of a layer, given as in the module or as timm calls it; '': what the network pools at its end.

        Raises:
            UsageError: no such layer, or no name on a module without a backbone.
            BackboneError: the backbone's last map cannot be found.
        """
        backbone = self.backbone
        if backbone is None:
            if not name:
                children = ", ".join(dict(self.module.named_children()))
                raise UsageError(f"which layer? give layer=NAME; {type(self.module).__name__} has {children}")
            find(self.module, name)
            return name
        inside = next(key for key, each in self.module.named_modules() if each is backbone)
        prefix = f"{inside}.model." if inside else "model."
        if name and not name.startswith(prefix):
            find(backbone.model, name)
        return name if name.startswith(prefix) else prefix + (name or backbone.map_layer())

    def feature_map(self, images: Tensor, name: str = "") -> Tensor:
        """What a layer answers for images [B, 3, H, W], as maps [B, C, h, w]; patch tokens become their grid.

        Raises:
            UsageError: no such layer, or it answers neither maps nor tokens.
            BackboneError: tokens that form no grid, or no spatial extent.
        """
        check_images(images)
        layer = self.layer(name)
        parts: list[Tensor] = []
        for part in images.split(self.batch):
            with recording(self.module, [layer]) as seen:
                self._score(part)
            if layer not in seen:
                raise UsageError(f"layer '{layer}' takes no part in the answer: choose another")
            parts.append(as_map(seen[layer], layer, part.shape[-2:], self.backbone))
        return torch.cat(parts)


class Encoder(nn.Module):
    """A frozen network that an attack looks through: images [B, 3, H, W] in [0, 1] -> features [B, D].

    It holds a copy of the network, stays in eval mode whatever it becomes a part of, and lets gradients reach the
    images and nothing else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        """
        Args:
            network: in eval mode; normalised images -> features. Of a `Classifier`, what its head reads.
            preprocessing: whose mean and deviation are applied here.

        Raises:
            UsageError: the network is in training mode.
        """
        super().__init__()
        check_mode(network)
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(3, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """
        Raises:
            DataError: images that are not float [B, 3, H, W] in [0, 1].
            UsageError: the network does not answer [B, D].
        """
        check_images(images)
        normalised = (images - self.mean) / self.std
        read = self.network.features if isinstance(self.network, Classifier) else self.network
        features = read(normalised)
        if not isinstance(features, Tensor) or features.ndim != 2:
            shown = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UsageError(f"the encoder answered {shown}: expected features [B, D]; pool its maps or tokens first")
        return features


def check_budget(eps: float) -> float:
    """`eps`, if it can be the largest change of a pixel of images in [0, 1].

    Raises:
        UsageError: not above 0, or so large that it must be meant for images of 0 to 255.
    """
    if eps >= 1:
        raise UsageError(f"eps={eps:g}: images are in [0, 1] here, give {eps:g}/255 = {eps / 255:.4f}")
    if not eps > 0:
        raise UsageError(f"eps={eps:g}: expected above 0 and below 1, such as 0.0314 (8/255)")
    return eps


def as_map(output: Any, layer: str, size: Sequence[int], backbone: Backbone | None) -> Tensor:
    """A layer's output -> [B, C, h, w]. Prefix tokens (class, registers, prompts) are left out."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"layer '{layer}' answers {shown}: expected maps [B, C, h, w] or tokens [B, N, C]")
    if output.ndim == 4:
        last = output.shape[1] == output.shape[2] != output.shape[3]
        if output.shape[2] == output.shape[3]:  # all alike, or channels first
            last = output.shape[1] == output.shape[2] and backbone is not None and backbone.channels_last
        maps = output.permute(0, 3, 1, 2) if last else output
    else:
        height, width = grid_of(output.shape[1], layer, size, backbone)
        maps = output[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
    if maps.shape[-2:] == (1, 1):
        raise BackboneError(f"layer '{layer}' has no spatial extent (1 x 1): choose an earlier layer")
    return maps


def grid_of(tokens: int, layer: str, size: Sequence[int], backbone: Backbone | None) -> tuple[int, int]:
    """Rows and columns of the patches among `tokens`: the network's own grid, or a square."""
    if backbone is not None:
        if not backbone.quirk.raster:
            raise BackboneError(f"the tokens of {backbone.arch} are not in reading order: choose a layer with a map")
        grid = backbone.grid(size)
        if grid is not None and tokens >= math.prod(grid):
            return grid
    side = math.isqrt(tokens)
    if side * side != tokens and math.isqrt(tokens - 1) ** 2 == tokens - 1:
        side = math.isqrt(tokens - 1)  # a class token
    elif side * side != tokens:
        raise BackboneError(f"layer '{layer}' has {tokens} tokens, which form no square grid: choose another layer")
    return side, side


@contextmanager
def frozen(module: nn.Module) -> Generator[None]:
    """No parameter takes part in a gradient within the block; afterwards each is as it was."""
    changed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def check_mode(module: nn.Module) -> None:
    if any(each.training for each in module.modules()):
        raise UsageError(
            f"{type(module).__name__} is in training mode, where dropout and batch statistics change every answer: "
            "call .eval() on it first"
        )


def check_images(images: Any) -> None:
    """Raises DataError unless images are float [B, 3, H, W] in [0, 1]; says what they seem to be instead."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shown = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"images came as {shown}: expected a tensor [B, 3, H, W] with values in [0, 1]")
    if not images.numel():
        raise DataError(f"no images: the batch is {tuple(images.shape)}")
    if not images.is_floating_point():
        raise DataError(f"images came as {images.dtype}: expected float in [0, 1], divide by 255")
    low, high = (float(value) for value in images.detach().aminmax())
    if not math.isfinite(low + high):
        raise DataError("images hold NaN or infinite values: expected [0, 1]")
    if low >= -SLACK and high <= 1 + SLACK:
        return
    shown = f"images have values from {low:.3g} to {high:.3g}, expected 0 to 1"
    if low >= 0 and high <= 255:
        raise DataError(f"{shown}: divide by 255" if high > 2 else f"{shown}: clip them")
    if low < -0.2:
        raise DataError(f"{shown}: they look normalised; give them before normalisation, it is done here")
    raise DataError(f"{shown}: clip them")


def check_scores(scores: Any, images: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != images:
        shown = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UsageError(
            f"the model answered {shown} for {images} images: expected scores [{images}, C]; reduce its answer to one "
            "number per class first"
        )
    if not torch.isfinite(scores.detach()).all():
        raise UsageError("the model answered NaN or infinite scores: its weights or its input are damaged")
    return cast(Tensor, scores)
