"""CLIP (Radford et al., ICML 2021, arXiv 2103.00020): images and texts in one space, learnt from pairs alone.

Of N pairs, unit vectors I of the images and T of the texts: every image must find its own text among all, and every
text its own image, by a cosine whose scale is learnt,

    L = (CE(e^s I T^t, 1..N) + CE(e^s T I^t, 1..N)) / 2,    s = log(1/0.07) at first, e^s <= 100.

Any class is then a sentence: its prompts' vectors, averaged and made unit again, are the rows of a classifier.

It needs images with texts, and gradients through both towers. Negatives are the whole batch, gathered from all
processes; memory that does not hold a batch splits it, and leaves each part fewer of them.

Where we depart: the image tower is any timm backbone, the language tower the sentence encoder that a package ships
(`text=sentence`) or the paper's causal transformer over bytes (`text=scratch`), for a vocabulary of 49,408 word pieces
takes more text than a private set has. What comes pretrained learns more slowly (`pretrained`). Adam's second
coefficient is the loop's 0.999. A text that comes twice in a batch counts as another's negative, as in the paper.

When not to use it: with labels instead of sentences (`fit` with any adapt method is ahead of training on "a photo of
a LABEL"); with a few hundred pairs, unless both towers come pretrained; for counting, negation and who does what to
whom, which a cosine of two vectors does not hold; for texts that only a reader of the image's fine print could match.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, Plan, build, make_plan
from foveal.backbones.causal_text import CausalText
from foveal.backbones.text import TextTower, sentence_encoder
from foveal.backbones.towers import SHARPEST, Towers, gathered
from foveal.core.errors import UsageError
from foveal.core.families.language import Language
from foveal.core.method import Recipe, Spec, method, trainable
from foveal.core.options import option, options


def contrastive_loss(
    images: Float[Tensor, "N D"], texts: Float[Tensor, "N D"], scale: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of N pairs over cosines times `scale` (paper, figure 3). Rows need not be unit.

    Raises:
        UsageError: a single pair, which has no negatives.
    """
    if len(images) < 2:
        raise UsageError("a batch of one pair has no negatives: choose a batch_size of at least 2")
    precise = torch.promote_types(images.dtype, torch.float32)  # at a scale of 100 bfloat16 is off by half a logit
    with torch.autocast(images.device.type, enabled=False):
        unit_images, unit_texts = F.normalize(images.to(precise), dim=1), F.normalize(texts.to(precise), dim=1)
        logits = scale * unit_images @ unit_texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@dataclass(frozen=True)
class Size:
    """A model of the paper: timm's name of its image tower, dim, width of its language tower."""

    image: str
    dim: int
    text: int


PAPER = {
    "RN50": Size("resnet50_clip", 1024, 512),
    "RN101": Size("resnet101_clip", 512, 512),
    "RN50x4": Size("resnet50x4_clip", 640, 640),
    "RN50x16": Size("resnet50x16_clip", 768, 768),
    "RN50x64": Size("resnet50x64_clip", 1024, 1024),
    "ViT-B/32": Size("vit_base_patch32_clip_quickgelu_224", 512, 512),
    "ViT-B/16": Size("vit_base_patch16_clip_quickgelu_224", 512, 512),
    "ViT-L/14": Size("vit_large_patch14_clip_quickgelu_224", 768, 768),
    "ViT-L/14@336": Size("vit_large_patch14_clip_quickgelu_336", 768, 768),
}


def paper_model(name: str) -> Towers:
    """A model of the paper with random weights: 12 layers of text over 49,408 word pieces, context 77.

    Raises:
        UsageError: the paper has none of that name.
    """
    if name not in PAPER:
        raise UsageError(f"no CLIP model '{name}': expected one of {', '.join(PAPER)}")
    size = PAPER[name]
    plan: Plan = make_plan(size.image, size.image, None, "random")
    text = CausalText(size.text, 12, vocabulary=49_408)
    return Towers(Backbone(plan, build(plan)), text, size.dim, bias=name.startswith("RN"))


@options
class Options:
    """What `clip` can be told."""

    text: Literal["sentence", "scratch"] = option(
        "sentence", "language tower: the packaged sentence encoder, or CLIP's own, new, over bytes"
    )
    dim: int = option(512, "length of the shared vectors", ge=2, le=8192)
    temperature: float = option(0.07, "temperature of the start", ge=0.01, le=100)
    learn_temperature: bool = option(True, "whether training changes the temperature")
    pretrained: float = option(0.1, "how fast pretrained towers learn, times lr; 0 freezes them", ge=0, le=1)
    crop: float = option(0.9, "smallest share of an image's area that a training view shows", gt=0, le=1)
    epochs: int = option(10, "passes over the training images", ge=1, le=10_000)
    lr: float = option(5e-4, "learning rate of what is new", gt=0, le=1)
    batch_size: int = option(128, "pairs per step, all negatives of each other", ge=2, le=65536)
    weight_decay: float = option(0.2, "pull of matrices towards zero", ge=0, le=10)


@method(
    Spec(
        family="language",
        title="CLIP: images and texts in one space",
        year=2021,
        arxiv="2103.00020",
        needs=frozenset({"text", "gradients"}),
        tasks=("image-text",),
    ),
    Options,
)
class Clip(Language):
    def tower(self) -> TextTower:
        return sentence_encoder() if self.options.text == "sentence" else CausalText(256, 4, context=256)

    def attach(self, backbone: Any, text: TextTower) -> nn.Module:
        chosen: Options = self.options
        towers = Towers(backbone, text, chosen.dim, temperature=chosen.temperature)
        for tower in (towers.image, towers.text):
            tower.requires_grad_(chosen.pretrained > 0 or is_new(tower))
        towers.log_scale.requires_grad_(chosen.learn_temperature)
        return towers

    def crop(self) -> tuple[float, float]:
        return (self.options.crop, 1.0)

    def parameter_groups(self, model: Towers, recipe: Recipe) -> list[dict[str, Any]]:
        """No decay on gains, biases and the scale; pretrained towers learn `pretrained` times as fast."""
        groups: list[dict[str, Any]] = []
        slow = {id(p) for tower in (model.image, model.text) if not is_new(tower) for p in tower.parameters()}
        for speed, pretrained in ((1.0, False), (self.options.pretrained, True)):
            own = [p for _, p in trainable(model) if (id(p) in slow) == pretrained]
            for decay, flat in ((recipe.weight_decay, False), (0.0, True)):
                params = [p for p in own if (p.ndim <= 1) == flat]
                groups += [{"params": params, "lr": recipe.lr * speed, "weight_decay": decay}] if params else []
        return groups

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images, texts, scale = model(batch["images"], batch["ids"], batch["mask"])
        return {"loss": contrastive_loss(gathered(images), gathered(texts), scale), "scale": scale.detach()}

    def after_step(self, model: Towers, step: int) -> None:
        """Keep the scale at or below 100."""
        with torch.no_grad():
            model.log_scale.clamp_(max=math.log(SHARPEST))


def is_new(tower: Backbone | TextTower) -> bool:
    """Whether a tower begins with random weights."""
    return tower.origin == "random"
