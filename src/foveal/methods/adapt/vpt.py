"""Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119): learned tokens beside the patches of a frozen ViT.

A few vectors P_i in R^{p x d} are put between the class token x and the patch tokens E of each block L_i; only they
and a linear head learn. Deep prompts are fresh in every block, what a block made of them is dropped:

    [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]),    y = head(norm(x_N)).

Shallow prompts enter once, before the first block, and are carried along. Prompts have no position embedding and
start uniform in +-sqrt(6 / (3 patch^2 + d)). A task is p*d numbers a block and a head; the backbone is shared.

It needs labels, a plain ViT (one token sequence) and gradients through it. Departures: the paper picks learning
rate, weight decay and p for each task among some 200 settings on held-out data; here one default (deep, p = 10,
AdamW at 1e-3) serves all. Prompts are dropped before the final norm and pooling, so backbones that average their
patch tokens work too. Registers and distillation tokens count as class tokens. Of the paper's variants only
prepended prompts are here.

When not to use it: on CNNs and windowed transformers (refused: see `lora`); when one task is all there is and
accuracy is all that counts (`full`); when latency counts, since every image carries p more tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveal.blocks.tuning import SteadyClassifier, zero_linear
from foveal.core.errors import BackboneError
from foveal.core.method import Adapt, Classifier, Spec, method
from foveal.core.options import option, options


def prompt_bound(patch: int | float, width: int) -> float:
    """v of the uniform start U(-v, v) for patches of `patch` pixels a side and tokens of `width` numbers."""
    return math.sqrt(6 / (3 * patch**2 + width))


def insert_prompts(
    tokens: Float[Tensor, "B N d"], prompts: Float[Tensor, "B p d"], prefix: int
) -> Float[Tensor, "B M d"]:
    """Tokens [B, N, d], prompts [B, p, d] -> [B, N + p, d], prompts right after the `prefix` class tokens."""
    if prompts.shape[1] == 0:
        return tokens
    return torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1)


def strip_prompts(tokens: Float[Tensor, "B M d"], count: int, prefix: int) -> Float[Tensor, "B N d"]:
    """Tokens [B, N + count, d] -> [B, N, d] without the `count` prompts that follow the class tokens."""
    if count == 0:
        return tokens
    return torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)


class PromptedClassifier(SteadyClassifier):
    """A frozen ViT with prompts [1 or N blocks, p, d] and a head: images [B, 3, H, W] -> logits [B, C]."""

    def __init__(self, backbone: Any, head: nn.Module, prompts: Tensor, dropout: float = 0.0) -> None:
        super().__init__(backbone, head)
        self.prompts = nn.Parameter(prompts)
        self.count: int = prompts.shape[1]
        self.dropout = nn.Dropout(dropout)

    def features(self, images: Tensor) -> Tensor:
        backbone: Any = self.backbone
        tokens, prefix, count = backbone.embed(images), backbone.prefix, self.count
        for index, block in enumerate(backbone.blocks):
            if index < len(self.prompts):
                if index > 0:
                    tokens = strip_prompts(tokens, count, prefix)
                expanded = self.prompts[index].expand(tokens.shape[0], -1, -1)
                tokens = insert_prompts(tokens, self.dropout(expanded).to(tokens.dtype), prefix)
            tokens = block(tokens)
        return backbone.finish_tokens(strip_prompts(tokens, count, prefix))


@options
class Options:
    """What `vpt` can be told."""

    prompts: int = option(10, "prompt tokens per block (p)", ge=0, le=1000)
    deep: bool = option(True, "fresh prompts in every block, rather than before the first one only")
    dropout: float = option(0.0, "share of prompt numbers dropped in training", ge=0, lt=1)
    epochs: int = option(20, "passes over the training images", ge=1, le=10_000)
    lr: float = option(1e-3, "learning rate", gt=0, le=100)
    batch_size: int = option(64, "images per step", ge=1, le=65536)
    weight_decay: float = option(1e-4, "pull of prompts and head towards zero", ge=0, le=10)
    augment: Literal["none", "light", "strong"] = option("light", "random crops and mirror images")


@method(
    Spec(
        family="adapt",
        title="Visual Prompt Tuning",
        year=2022,
        arxiv="2203.12119",
        needs=frozenset({"labels", "tokens", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Vpt(Adapt):
    def attach(self, backbone: Any, classes: int) -> Classifier:
        """
        Raises:
            BackboneError: the backbone is not a plain ViT.
        """
        if not backbone.has_tokens:
            raise BackboneError(
                f"VPT needs transformer blocks with one token sequence that can grow; {backbone.arch} "
                f"({backbone.family}) has none: use a plain ViT such as vit, which comes with foveal, or --method lora"
            )
        chosen: Options = self.options
        backbone.requires_grad_(False).eval()
        size = backbone.preprocessing.size
        with torch.no_grad():
            tokens = backbone.embed(torch.zeros(1, 3, size, size))
        patch = size / math.sqrt(tokens.shape[1] - backbone.prefix)
        bound = prompt_bound(patch, tokens.shape[2])
        places = len(backbone.blocks) if chosen.deep else 1
        prompts = torch.empty(places, chosen.prompts, tokens.shape[2]).uniform_(-bound, bound)
        return PromptedClassifier(backbone, zero_linear(backbone.width, classes), prompts, chosen.dropout)
