"""Fine-tuning attention alone (Touvron et al., ECCV 2022, arXiv 2203.09795, "Three things everyone should know").

The second of the three things: to adapt a vision transformer it is enough to train the query, key, value and output
projections of every self-attention block and a new head,

    theta = {W_qkv, b_qkv, W_proj, b_proj}_blocks + head,    everything else stays as pretrained.

That is about a third of the weights. MLPs, norms, patch and position embeddings are frozen, so a step needs less
time and memory than full fine-tuning, and a task is stored as the tensors that changed (`extract_delta`,
`apply_delta`) on a shared base.

It needs labels, self-attention blocks (plain, windowed or hybrid transformers) and gradients through the backbone.
Departures: the backbone runs in eval mode, without drop-path; the recipe (AdamW, 1e-4) is ours, made for hundreds
to thousands of images, where the paper's is for ImageNet. `ffn_only` is the mirror image, kept as the baseline to
compare with.

When not to use it: on networks without self-attention (refused: see `lora` or `full`); on large data unlike the
pretraining images with a small backbone, where the paper itself finds full fine-tuning better; when a task must fit
into kilobytes (`vpt`, `lora`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveal.backbones.quirks import PROJECTIONS, is_self_attention
from foveal.blocks.tuning import SteadyClassifier, two_speeds, zero_linear
from foveal.core.errors import BackboneError
from foveal.core.method import Adapt, Classifier, Recipe, Spec, method
from foveal.core.options import option, options

PARTS = (*PROJECTIONS, "q_bias", "k_bias", "v_bias")


def attention_only(model: nn.Module, positions: bool = False) -> list[str]:
    """Freeze all of a model but the projections of its self-attention. Returns the names of what still learns.

    Args:
        positions: let the position embedding learn too, as for images of another size than it was trained on.

    Raises:
        BackboneError: there is no self-attention.
    """
    blocks = [name for name, module in model.named_modules() if is_self_attention(module)]
    if not blocks:
        raise BackboneError(
            f"no self-attention blocks found in {getattr(model, 'arch', type(model).__name__)}: "
            "expected a transformer such as vit, which comes with foveal; on other networks use lora or full"
        )
    places = {f"{name}.{part}" if name else part for name in blocks for part in PARTS}
    if positions:
        places |= {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "pos_embed"}
    return learn_only(model, places)


def ffn_only(model: nn.Module) -> list[str]:
    """The mirror image: freeze all of a model but the MLPs of its transformer blocks.

    Raises:
        BackboneError: no block holds self-attention and an `mlp` side by side.
    """
    blocks = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "mlp") and any(is_self_attention(child) for child in module.children())
    ]
    if not blocks:
        raise BackboneError(
            "no transformer blocks with an mlp: expected a network such as vit, which comes with foveal"
        )
    return learn_only(model, {f"{name}.mlp" if name else "mlp" for name in blocks})


def learn_only(model: nn.Module, places: set[str]) -> list[str]:
    """Let only the parameters learn that are at or directly or deeper inside these places."""
    names: list[str] = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        chosen = any(".".join(parts[:end]) in places for end in range(1, len(parts) + 1))
        parameter.requires_grad_(chosen)
        if chosen:
            names.append(name)
    return names


def extract_delta(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's state dict that are new or differ from `base`, as copies: a task to store."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name not in base or not torch.equal(tensor, base[name])
    }


def apply_delta(model: nn.Module, delta: Mapping[str, Tensor]) -> None:
    """Put a task's tensors into a model that has the base's.

    Raises:
        BackboneError: a tensor has no place of its shape in the model.
    """
    own = model.state_dict()
    for name, tensor in delta.items():
        if name not in own or own[name].shape != tensor.shape:
            found = f"shape {tuple(own[name].shape)}" if name in own else "no such tensor"
            raise BackboneError(
                f"delta has {name} of shape {tuple(tensor.shape)}, the model {found}: use the base it was made from"
            )
    with torch.no_grad():
        for name, tensor in delta.items():
            own[name].copy_(tensor)


@options
class Options:
    """What `attention-only` can be told."""

    epochs: int = option(10, "passes over the training images", ge=1, le=10_000)
    lr: float = option(1e-4, "learning rate of the attention weights", gt=0, le=1)
    head_lr_multiplier: float = option(10.0, "how many times faster the new last layer learns", gt=0, le=1000)
    batch_size: int = option(32, "images per step", ge=1, le=65536)
    weight_decay: float = option(0.01, "pull of matrices towards zero", ge=0, le=10)
    augment: Literal["none", "light", "strong"] = option("light", "random crops and mirror images")
    positions: bool = option(False, "let the position embedding learn too, for images of another size")


@method(
    Spec(
        family="adapt",
        title="Attention-only fine-tuning",
        year=2022,
        arxiv="2203.09795",
        needs=frozenset({"labels", "attention", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class AttentionOnly(Adapt):
    def attach(self, backbone: Any, classes: int) -> Classifier:
        """
        Raises:
            BackboneError: the backbone has no self-attention.
        """
        attention_only(backbone, self.options.positions)
        return SteadyClassifier(backbone, zero_linear(backbone.width, classes))

    def parameter_groups(self, model: Classifier, recipe: Recipe) -> list[dict[str, Any]]:
        return two_speeds(model, recipe, self.options.head_lr_multiplier)
