"""UniFormer (Li et al., TPAMI 2023, arXiv 2201.09450; video: 2201.04676): convolution early, attention late, one block.

Every block adds a position by a depthwise convolution, relates places, and mixes channels:

    x += DW3(x),    x += R(norm x),    x += MLP(norm x).

In the first two stages R is local, Conv1x1 DW5x5 Conv1x1 after a batch norm: what is redundant in an image is near. In
the last two it is attention among all places after a layer norm. A clip [B, 3, T, H, W] goes through the same net with
three-dimensional convolutions and attention over space and time; `inflate` makes its weights from an image net's.

Image nets are registered with timm; `create_video_model` builds the others, since timm has no video. Sizes are
multiples of 32 pixels, frames a multiple of 2; no weight depends on either.
Departures: layer scale is an argument of each model (in the published code building a scaled model changed all later
ones); token labelling and its second head are left out. The paper prints 12.6 GMACs for `large_ls`, which does not
follow from the published widths: ours has 19.7 at the published number of weights.

When not to use it: at high resolution without more memory, since stage 3 attends among (H W / 256)^2 pairs; when a
model must stay fast on engines without batch-norm folding. No pretrained weights come with foveal.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._pyramid import Pyramid, Stage, build_pyramid, cfg, four, pooled_head
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError

Mixer = Literal["local", "global"]
CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.ndim - 1
        x = F.layer_norm(x.movedim(1, last), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(last, 1)


class LocalBlock(nn.Module):
    """The block with local relations on [B, C, H, W], or [B, C, T, H, W] for `rank` 3."""

    def __init__(self, dim: int, drop_path: float = 0.0, rank: int = 2) -> None:
        super().__init__()
        conv = CONV[rank]
        self.pos_embed = conv(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = NORM[rank](dim)
        self.conv1 = conv(dim, dim, 1)
        self.attn = conv(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = conv(dim, dim, 1)
        self.norm2 = NORM[rank](dim)
        self.fc1 = conv(dim, 4 * dim, 1)
        self.fc2 = conv(4 * dim, dim, 1)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold both batch norms, as they are in eval mode, into the 1x1 convolutions that follow them."""
        for name, conv in (("norm1", self.conv1), ("norm2", self.fc1)):
            norm = getattr(self, name)
            if isinstance(norm, nn.Identity):
                continue
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift = norm.bias.double() - norm.running_mean.double() * scale
            weight = conv.weight.double()
            conv.bias.copy_(conv.bias.double() + weight.flatten(1) @ shift)
            conv.weight.copy_(weight * scale.view(1, -1, *[1] * (weight.ndim - 2)))
            setattr(self, name, nn.Identity())


class GlobalBlock(nn.Module):
    """The block with attention among all places of [B, C, H, W], or [B, C, T, H, W] for `rank` 3.

    Args:
        layer_scale: whether both residual branches have a learned weight per channel, 1e-6 at the start.
    """

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0, layer_scale: bool = False, rank: int = 2) -> None:
        super().__init__()
        self.pos_embed = CONV[rank](dim, dim, 3, padding=1, groups=dim)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-6)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-6)) if layer_scale else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        size = tuple(map(int, x.shape[2:]))
        tokens = x.flatten(2).transpose(1, 2)
        related = self.attn(self.norm1(tokens))
        tokens = tokens + self.drop_path(related if self.gamma_1 is None else self.gamma_1 * related)
        mixed = self.mlp(self.norm2(tokens))
        tokens = tokens + self.drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed)
        return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], *size)


def embedding(before: int, dim: int, stage: int, conv_stem: bool, rank: int) -> nn.Sequential:
    """What halves a map's sides, or divides an image's by four, before a stage (and a clip's frames by two)."""
    if rank == 3:
        if stage == 0:
            return nn.Sequential(nn.Conv3d(before, dim, (3, 4, 4), (2, 4, 4), (1, 0, 0)), ChannelNorm(dim))
        return nn.Sequential(nn.Conv3d(before, dim, (1, 2, 2), (1, 2, 2)), ChannelNorm(dim))
    if not conv_stem:
        side = 2 if stage else 4
        return nn.Sequential(nn.Conv2d(before, dim, side, side), ChannelNorm(dim))
    if stage:
        return nn.Sequential(nn.Conv2d(before, dim, 3, 2, 1), nn.BatchNorm2d(dim))
    half = dim // 2
    return nn.Sequential(
        nn.Conv2d(before, half, 3, 2, 1),
        nn.BatchNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, dim, 3, 2, 1),
        nn.BatchNorm2d(dim),
    )


class UniFormer(Pyramid):
    """UniFormer; arguments not named here are those of every timm model.

    Args:
        head_dim: channels of an attention head.
        conv_stem: overlapping convolutions between the stages, as in the `plus` variants.
        layer_scale: see `GlobalBlock`.
        mixers: 'local' or 'global' relations, stage by stage.
        rank: 2 for images, 3 for clips [B, 3, T, H, W].

    Raises:
        BackboneError: widths that are no multiple of `head_dim` where there is attention.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 8, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        head_dim: int = 64,
        conv_stem: bool = False,
        layer_scale: bool = False,
        mixers: Sequence[Mixer] = ("local", "local", "global", "global"),
        rank: Literal[2, 3] = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims, depths = four("uniformer", dims, "dims"), four("uniformer", depths, "depths")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[Stage] = []
        for i, dim in enumerate(dims):
            if mixers[i] == "global" and dim % head_dim:
                raise BackboneError(f"uniformer: width {dim} of stage {i + 1} is no multiple of head_dim {head_dim}")
            blocks: list[nn.Module] = [
                LocalBlock(dim, rate, rank)
                if mixers[i] == "local"
                else GlobalBlock(dim, dim // head_dim, rate, layer_scale, rank)
                for rate in rates[i]
            ]
            stages.append(Stage(embedding(dims[i - 1] if i else in_chans, dim, i, conv_stem, rank), blocks))
        super().__init__(
            nn.Identity(), stages, NORM[rank](dims[-1]), pooled_head(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims, strides=(4, 8, 16, 32), in_chans=in_chans, num_classes=num_classes,
        )  # fmt: skip
        self.rank = rank
        self.apply(init_weights)

    def check_input(self, height: int, width: int) -> None:
        if height % 32 or width % 32 or min(height, width) < 32:
            near = [max(32, round(side / 32) * 32) for side in (height, width)]
            raise BackboneError(
                f"UniFormer: images of {height}x{width} pixels: both sides must be multiples of 32, "
                f"such as {near[0]}x{near[1]}"
            )

    def run(self, x: Tensor, count: int | None = None) -> tuple[list[Tensor], Tensor]:
        if x.ndim != self.rank + 2:
            expected = "images [B, C, H, W]" if self.rank == 2 else "clips [B, C, T, H, W]"
            raise BackboneError(f"UniFormer: input of shape {tuple(x.shape)}: expected {expected}")
        if self.rank == 3 and (x.shape[2] < 2 or x.shape[2] % 2):
            raise BackboneError(f"UniFormer: clips of {int(x.shape[2])} frames: expected an even number, at least 2")
        return super().run(x, count)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x.flatten(2, 3) if x.ndim == 5 else x, pre_logits)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def inflate(state_dict: Mapping[str, Tensor], video: UniFormer, how: Literal["centre", "repeat"] = "centre") -> None:
    """Give a video net the weights of an image net of the same widths; the classifier is left as it is.

    Args:
        state_dict: of an image UniFormer without layer scale and with non-overlapping embeddings.
        how: 'centre' puts a 2-D kernel at the middle frame, zeros elsewhere; 'repeat' spreads it over all frames.

    Raises:
        BackboneError: the two nets do not have the same parts.
    """
    own = video.state_dict()
    given = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")}
    odd = sorted(given.keys() ^ {name for name in own if not name.startswith("head.")})
    if odd:
        raise BackboneError(
            f"cannot inflate: {len(odd)} tensors such as {odd[0]} are in one of the two nets only; expected an image "
            "UniFormer of the same depths, without layer scale and without a convolution stem"
        )
    for name, tensor in given.items():
        target = own[name]
        if target.ndim == 5:
            frames = target.shape[2]
            if how == "centre":
                inflated = tensor.new_zeros(target.shape)
                inflated[:, :, frames // 2] = tensor
            else:
                inflated = (tensor / frames)[:, :, None].expand(target.shape)
            own[name] = inflated
        else:
            own[name] = tensor
    video.load_state_dict(own)


VIDEO: dict[str, dict[str, Any]] = {
    "uniformer_video_small": {"depths": (3, 4, 8, 3)},
    "uniformer_video_base": {"depths": (5, 8, 20, 7)},
}


def create_video_model(name: str, **kwargs: Any) -> UniFormer:
    """A net for clips [B, 3, T, H, W] with random weights and 400 classes unless told otherwise.

    Raises:
        BackboneError: no such net.
    """
    if name not in VIDEO:
        raise BackboneError(f"no video net '{name}': expected {' or '.join(VIDEO)}")
    return UniFormer(**{"rank": 3, "num_classes": 400, **VIDEO[name], **kwargs})


def conf() -> dict[str, Any]:
    return cfg(first_conv="stages.0.downsample.0", crop_pct=0.9)


NAMES = ("small", "small_plus", "small_plus_dim64", "base", "base_ls", "large_ls")
default_cfgs = generate_default_cfgs({f"uniformer_{name}": conf() for name in NAMES})


def create(variant: str, pretrained: bool, depths: tuple[int, ...], given: dict[str, Any], **more: Any) -> UniFormer:
    return build_pyramid(UniFormer, variant, pretrained, {"depths": depths, **more}, given)


@register_model
def uniformer_small(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    return create("uniformer_small", pretrained, (3, 4, 8, 3), kwargs)


@register_model
def uniformer_small_plus(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    return create("uniformer_small_plus", pretrained, (3, 5, 9, 3), kwargs, conv_stem=True, head_dim=32)


@register_model
def uniformer_small_plus_dim64(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    return create("uniformer_small_plus_dim64", pretrained, (3, 5, 9, 3), kwargs, conv_stem=True)


@register_model
def uniformer_base(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    return create("uniformer_base", pretrained, (5, 8, 20, 7), kwargs)


@register_model
def uniformer_base_ls(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    return create("uniformer_base_ls", pretrained, (5, 8, 20, 7), kwargs, layer_scale=True)


@register_model
def uniformer_large_ls(pretrained: bool = False, **kwargs: Any) -> UniFormer:
    wide = {"dims": (128, 192, 448, 640), "layer_scale": True}
    return create("uniformer_large_ls", pretrained, (5, 10, 24, 7), kwargs, **wide)
