"""AdvEncoder (Zhou et al., ICCV 2023, arXiv 2307.12280): one perturbation that breaks whatever is built on an encoder.

A generator turns noise z, drawn once, into one change delta for all images, so that a frozen encoder E no longer
recognises an image it has seen,

    x' = clip(x + clamp(G(z), -eps, eps)),    min_G  -alpha InfoNCE(E(x), E(x')) + |x' - x|^2 - |HP_r(x) - HP_r(x')|^2,

where HP_r keeps the frequencies from r cycles an image on (means of squares). InfoNCE takes the same image's pair as
positive and the other images of the batch as negatives, on cosines over 0.1: it is negated, and so is the
high-frequency term, which pushes texture away. `kind=patch` paints a square of `area` instead. It needs gradients
through the encoder and some images; no labels, and no knowledge of the classifier.

Where we depart from the paper: candidates and width are a sixteenth and a quarter of its 256 and 128 (a step of that
generator takes seconds on a CPU; both are options); rate warm-up and cosine as everywhere in foveal; attacked images
are clipped to [0, 1], which the authors' code leaves out, and all terms are measured in [0, 1]; G grows to the image,
4 2^k pixels shrunk to its side, where the paper's is tied to 64. Of the batch-norm scales of G, which the paper draws
from N(0, 0.02), the mean is 1, as in DCGAN.

When not to use it: as a proof of robustness. It is one weak-knowledge attack; where it fails, an attack that knows
the classifier and changes every image differently may not. Read it beside noise of the same size, never alone.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.backbones.wrapper import check_budget
from foveal.core.errors import DataError, UsageError
from foveal.core.families.robust import Perturbation, Robust
from foveal.core.method import Recipe, Spec, method
from foveal.core.options import option, options

NOISE = 100
TEMPERATURE = 0.1
MARGIN = 14 / 64
"""How far from the right and the bottom border a patch lies, as a share of the side."""


def high_pass(images: Float[Tensor, "*b H W"], radius: float) -> Float[Tensor, "*b H W"]:
    """What is left of images without the frequencies below `radius` cycles an image; radius 0 leaves them whole."""
    height, width = images.shape[-2:]
    down, across = (torch.fft.fftfreq(n, 1 / n, device=images.device) for n in (height, width))
    kept = torch.hypot(down[:, None], across[None]) >= radius
    return torch.fft.ifft2(torch.fft.fft2(images) * kept).real


def info_nce(
    first: Float[Tensor, "b D"], second: Float[Tensor, "b D"], temperature: float = TEMPERATURE
) -> Float[Tensor, ""]:
    """Mean over i of -log softmax_j(cos(first_i, second_j) / temperature) at j = i.

    Raises:
        DataError: one image, which has no other to be told from.
    """
    if len(first) < 2:
        raise DataError("a batch of 1 image: this loss compares images, give at least 2")
    scores = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(first), device=first.device))


def patch_mask(size: int, area: float) -> Float[Tensor, "1 S S"]:
    """1 in a square of `area` (share of the image) near the lower right corner, 0 elsewhere.

    Raises:
        UsageError: the square is empty, or does not fit with its margin.
    """
    side, margin = int(math.sqrt(area) * size), round(MARGIN * size)
    if side < 1 or side + margin > size:
        raise UsageError(
            f"area={area:g}: a patch of {side} x {side} pixels, {margin} from the border, does not fit an image of "
            f"{size} x {size}"
        )
    mask = torch.zeros(1, size, size)
    mask[:, size - margin - side : size - margin, size - margin - side : size - margin] = 1
    return mask


class Generator(nn.Module):
    """Noise [B, 100, 1, 1], always the same -> one image [3, S, S]: B candidates, mixed by a convolution across them.

    Batch norm keeps the statistics of the B candidates, so it is always in training mode.
    """

    noise: Tensor

    def __init__(self, candidates: int, width: int, size: int) -> None:
        super().__init__()
        stages = max(1, math.ceil(math.log2(size / 4)))
        widths = [max(4, 8 * width // 2**stage) for stage in range(stages)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(NOISE, widths[0], 4, 1, 0)]
        for inner, outer in zip(widths, [*widths[1:], 3], strict=True):
            layers += [nn.BatchNorm2d(inner), nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, 2, 1)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.mix = nn.Conv2d(candidates, 1, 3, padding=1)
        self.size = size
        self.register_buffer("noise", torch.randn(candidates, NOISE, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def train(self, mode: bool = True) -> Generator:
        return super().train(True)

    def forward(self) -> Tensor:
        mixed = self.mix(self.layers(self.noise).transpose(0, 1))[:, 0]
        if mixed.shape[-1] != self.size:
            mixed = F.interpolate(mixed[None].float(), (self.size, self.size), mode="bilinear", antialias=True)[0]
        return mixed


class Attacker(nn.Module):
    """A frozen encoder and the generator that learns against it: images [B, 3, S, S] -> the same, attacked."""

    mask: Tensor

    def __init__(self, encoder: nn.Module, generator: Generator, mask: Tensor, eps: float) -> None:
        super().__init__()
        self.encoder, self.generator, self.eps = encoder, generator, eps
        self.register_buffer("mask", mask)

    def delta(self) -> Tensor:
        """What is added to every image [3, S, S]."""
        made = self.generator()
        return (0.5 + made).clamp(0, 1) * self.mask if self.mask.any() else made.clamp(-self.eps, self.eps)

    def forward(self, images: Tensor) -> Tensor:
        return (images * (1 - self.mask) + self.delta()).clamp(0, 1)


@options
class Options:
    """What `advencoder` can be told."""

    kind: Literal["perturbation", "patch"] = option("perturbation", "change every pixel a little, or paint a square")
    eps: float = option(10 / 255, "largest change of a pixel, as a share of the brightness range (10/255 = 0.0392)")
    area: float = option(0.03, "share of the image that a patch covers", gt=0, lt=1)
    alpha: float = option(5.0, "weight of the term that the encoder sees", ge=0, le=1000)
    radius: float = option(8.0, "cycles an image from which on frequencies are pushed away", ge=0, le=512)
    candidates: int = option(16, "images that the generator mixes (the paper's: 256)", ge=2, le=1024)
    width: int = option(32, "channels of the generator's last wide layer (the paper's: 128)", ge=1, le=512)
    epochs: int = option(10, "passes over the images (the paper's: 20)", ge=1, le=10_000)
    lr: float = option(2e-4, "learning rate of the generator", gt=0, le=1)
    batch_size: int = option(16, "images per step (the paper's: 256)", ge=2, le=65536)


@method(
    Spec(
        family="robust",
        title="AdvEncoder: downstream-agnostic adversarial examples",
        year=2023,
        arxiv="2307.12280",
        needs=frozenset({"gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Advencoder(Robust):
    def attack(self, encoder: Any, size: int) -> nn.Module:
        """
        Raises:
            UsageError: a budget for images of 0 to 255, or a patch that does not fit.
        """
        chosen: Options = self.options
        mask = patch_mask(size, chosen.area) if chosen.kind == "patch" else torch.zeros(1, size, size)
        return Attacker(encoder, Generator(chosen.candidates, chosen.width, size), mask, check_budget(chosen.eps))

    def recipe(self) -> Recipe:
        chosen: Options = self.options
        return Recipe(chosen.epochs, chosen.batch_size, chosen.lr, weight_decay=0.0, augment="none")

    def parameter_groups(self, model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
        learning = [each for each in model.parameters() if each.requires_grad]
        return [{"params": learning, "lr": recipe.lr, "weight_decay": 0.0, "betas": (0.5, 0.999)}]

    def loss(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """The terms for images [B, 3, S, S] in [0, 1]; labels, where there are any, are not read.

        Raises:
            DataError: a batch of one image, or images of another range.
        """
        chosen: Options = self.options
        images = batch["images"]
        attacked = model(images)
        learner = getattr(model, "module", model)
        with torch.no_grad():
            clean = learner.encoder(images)
        seen = -info_nce(clean.float(), learner.encoder(attacked).float())
        quality = F.mse_loss(attacked.float(), images)
        texture = -F.mse_loss(high_pass(attacked.float(), chosen.radius), high_pass(images, chosen.radius))
        return {"loss": chosen.alpha * seen + quality + texture, "seen": seen, "quality": quality, "texture": texture}

    @torch.no_grad()
    def finish(self, model: Any) -> Perturbation:
        budget = 1.0 if model.mask.any() else model.eps
        return Perturbation(model.delta().detach().cpu(), model.mask.cpu(), budget)
