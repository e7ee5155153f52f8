"""How timm's families differ where foveal needs to see inside: one row per family, looked up by class name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Family = Literal["cnn", "vit", "windowed", "hybrid"]


@dataclass(frozen=True)
class Quirk:
    """`embed` and `finish` are given when tokens may be added, dropped or merged between the blocks; `raster` says
    whether patch tokens are in reading order."""

    family: Family
    embed: Callable[[Any, Tensor], Tensor] | None = None
    finish: Callable[[Any, Tensor], Tensor] | None = None
    raster: bool = True


def embed_plain(model: Any, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> prefix and patch tokens [B, N, d] with positions, as the first block reads them."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def finish_plain(model: Any, tokens: Tensor) -> Tensor:
    """Tokens [B, N, d] after the last block -> features [B, D]."""
    return model.forward_head(model.norm(tokens), pre_logits=True)


PLAIN = Quirk("vit", embed_plain, finish_plain)
POSITION_IN_ATTENTION = Quirk("vit")
WINDOWED = Quirk("windowed")
HYBRID = Quirk("hybrid")

QUIRKS: dict[str, Quirk] = {
    "VisionTransformer": PLAIN,
    "VisionTransformerDistilled": PLAIN,
    "T2TViT": PLAIN,
    # a bias or rotation for every pair of positions is fixed inside attention: its token set cannot change
    "VisionTransformerRelPos": POSITION_IN_ATTENTION,
    "OrchidViT": POSITION_IN_ATTENTION,
    "Beit": POSITION_IN_ATTENTION,
    "Eva": POSITION_IN_ATTENTION,
    "Cait": POSITION_IN_ATTENTION,
    "Xcit": POSITION_IN_ATTENTION,
    "ConVit": POSITION_IN_ATTENTION,
    "ConViT": POSITION_IN_ATTENTION,
    "LocalVit": POSITION_IN_ATTENTION,
    "SwinTransformer": WINDOWED,
    "SwinTransformerV2": WINDOWED,
    "SwinTransformerV2Cr": WINDOWED,
    "VisionTransformerSAM": WINDOWED,
    "Hiera": Quirk("windowed", raster=False),
    "MultiScaleVit": WINDOWED,
    "Nest": WINDOWED,
    "Twins": WINDOWED,
    "DaVit": WINDOWED,
    "MaxxVit": HYBRID,
}


BLOCK_ENDS = {
    "BasicBlock": "conv2",
    "Bottleneck": "conv3",
    "DepthwiseSeparableConv": "conv_pw",
    "EdgeResidual": "conv_pwl",
    "InvertedResidual": "conv_pwl",
    "UniversalInvertedResidual": "pw_proj",
}
"""Classes of residual blocks, and where the last convolution before the sum is: the convolution, or one with a norm."""


PROJECTIONS = ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "kv", "qk", "proj")
"""What layers are called that make queries, keys and values, one by one or several at once, and the output."""
LAYOUTS = ({"qkv"}, {"q", "kv"}, {"qk", "v"}, {"q", "k", "v"}, {"q_proj", "k_proj", "v_proj"})


def is_self_attention(module: nn.Module) -> bool:
    """Whether a module projects its input to queries, keys and values itself (pooling by a learnt query does not)."""
    children = dict(module.named_children())
    return "proj" in children and not hasattr(module, "latent") and any(names <= children.keys() for names in LAYOUTS)


def quirk_of(model: nn.Module) -> Quirk:
    """The row of a model's class; classes without a row are CNNs, or hybrids when they hold self-attention."""
    row = QUIRKS.get(type(model).__name__)
    if row is None:
        return HYBRID if any(map(is_self_attention, model.modules())) else Quirk("cnn")
    if row is PLAIN and hasattr(getattr(model, "patch_embed", None), "backbone"):
        return Quirk("hybrid", embed_plain, finish_plain)
    return row
