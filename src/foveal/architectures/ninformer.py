"""NiNformer (Abdullah 2024, arXiv 2403.02411): a token mixer that writes the gate of another layer.

Without attention, on few tokens: an MLP-Mixer v mixes tokens and channels of the normalised input, and multiplies a
linear projection of the same input element by element, so that what a token passes on depends on all tokens,

    h = LN x,    v = Mixer(h),    x <- x + (W h + b) * v,    x <- x + FFN(LN x).

Both layer norms are one module, as in the author's code (`shared_norm=False` makes two). The Mixer is timm's
`MixerBlock`, the frame its `MlpMixer`, without a final norm. Without the gate's product (W = 0, b = 1) a block is a
Mixer and a feed-forward layer; the paper's other baselines leave out the channel MLP or put attention in its place.

Departures: none in the block. The scores of the paper are not repeated here: they could not be verified.

When not to use it: on images of several sizes, or sequences of several lengths (N tokens are fixed; `resized` makes a
copy for another size, by bilinear interpolation of the token weights); on large images, where the token MLP grows with
N; with the published dropout of 0.5 on widths under 64, which underfits (a warning says so).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


class NiNBlock(nn.Module):
    """Tokens [B, N, d] -> [B, N, d], N fixed; a `block_layer` of timm's `MlpMixer`.

    Args:
        seq_len: N.
        mlp_ratio: width of the token MLP and of the two channel MLPs, both over d.
        shared_norm: one layer norm before the mixer and before the feed-forward layer.

    Raises:
        BackboneError: another number of tokens comes in.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float | tuple[float, float] = 2.0,
        mlp_layer: type[nn.Module] = Mlp,
        norm_layer: Any = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        shared_norm: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: Any = {"device": device, "dtype": dtype}
        ratio: Any = mlp_ratio
        self.seq_len = seq_len
        self.norm = norm_layer(dim, **dd)
        self.mixer = MixerBlock(dim, seq_len, ratio, mlp_layer, norm_layer, act_layer, drop, **dd)
        self.gate = nn.Linear(dim, dim, **dd)
        self.norm2 = None if shared_norm else norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(to_2tuple(mlp_ratio)[1] * dim), act_layer=act_layer, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.seq_len:
            raise BackboneError(
                f"{int(x.shape[1])} tokens, built for {self.seq_len}: a mixer's number of tokens is fixed; resized() "
                "makes a copy for another image size"
            )
        h = self.norm(x)
        x = x + self.drop_path(self.gate(h) * self.mixer(h))
        return x + self.drop_path(self.mlp((self.norm if self.norm2 is None else self.norm2)(x)))


class NiNformer(MlpMixer):
    """NiNformer; arguments not named here are those of timm's `MlpMixer`.

    Args:
        shared_norm: as `NiNBlock`.
        gated: False makes blocks of timm's `MixerBlock` alone, an MLP-Mixer, for comparison.

    Raises:
        BackboneError: an image size that the patches do not divide, or images of another size or depth.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_blocks: int = 4,
        embed_dim: int = 256,
        mlp_ratio: float | tuple[float, float] = 2.0,
        proj_drop_rate: float = 0.0,
        shared_norm: bool = True,
        gated: bool = True,
        norm_layer: Any = nn.LayerNorm,
        **kwargs: Any,
    ) -> None:
        height, width = (int(side) for side in to_2tuple(img_size))
        if height % patch_size or width % patch_size:
            raise BackboneError(f"image of {height}x{width} pixels: patches of {patch_size} do not divide its sides")
        if proj_drop_rate >= 0.5 and embed_dim < 64:
            warnings.warn(
                f"dropout {proj_drop_rate} on width {embed_dim} underfits: lower one or raise the other", stacklevel=2
            )
        ratio: Any = mlp_ratio
        block: Any = partial(NiNBlock, shared_norm=shared_norm) if gated else MixerBlock
        size: Any = img_size
        super().__init__(
            img_size=size, patch_size=patch_size, in_chans=in_chans, num_blocks=num_blocks, embed_dim=embed_dim,
            mlp_ratio=ratio, proj_drop_rate=proj_drop_rate, block_layer=block, norm_layer=norm_layer, **kwargs,
        )  # fmt: skip
        self.norm = nn.Identity()
        self.stem.register_forward_pre_hook(check_input)

    def no_weight_decay(self) -> set[str]:
        return set()


def check_input(stem: Any, given: tuple[Tensor]) -> None:
    found = tuple(int(side) for side in given[0].shape[1:])
    expected = (stem.proj.in_channels, *stem.img_size)
    if found != expected:
        raise BackboneError(
            f"images of shape {found}: the model was built for {expected}, and its number of tokens is fixed"
        )


def resized(model: NiNformer, img_size: int | tuple[int, int]) -> NiNformer:
    """A copy for another image size, its token weights interpolated bilinearly over the grid of patches.

    What reads the tokens is divided by how many more of them there are, so that sums keep their size.

    Raises:
        BackboneError: the patches do not divide the size.
    """
    model = copy.deepcopy(model)
    old, patch = model.stem.grid_size, int(model.stem.patch_size[0])
    height, width = (int(side) for side in to_2tuple(img_size))
    if height % patch or width % patch:
        raise BackboneError(f"image of {height}x{width} pixels: patches of {patch} do not divide its sides")
    model.stem.set_input_size((height, width))
    new = model.stem.grid_size
    count, share = new[0] * new[1], (old[0] * old[1]) / (new[0] * new[1])

    def spread(rows: Tensor) -> nn.Parameter:
        grid = F.interpolate(rows.detach().unflatten(1, old)[None], new, mode="bilinear", align_corners=False)
        return nn.Parameter(grid[0].flatten(1))

    for each in model.blocks:
        block: Any = each
        tokens: Any = block.mixer.mlp_tokens
        block.seq_len = tokens.fc1.in_features = tokens.fc2.out_features = count
        tokens.fc1.weight = nn.Parameter(spread(tokens.fc1.weight).detach() * share)
        tokens.fc2.weight = nn.Parameter(
            spread(tokens.fc2.weight.transpose(0, 1)).detach().transpose(0, 1).contiguous()
        )
        tokens.fc2.bias = nn.Parameter(spread(tokens.fc2.bias[None]).detach()[0])
    return model


def _cfg(channels: int, size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (channels, size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "first_conv": "stem.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.02411",
        "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        "origin_url": "https://github.com/Abdullah-88/NiNformer",
    }


default_cfgs = generate_default_cfgs({"ninformer_cifar": _cfg(3, 32), "ninformer_mnist": _cfg(1, 28)})


def create(variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any) -> NiNformer:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(NiNformer, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})


@register_model
def ninformer_cifar(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    return create("ninformer_cifar", pretrained, kwargs, img_size=32, num_classes=10)


@register_model
def ninformer_mnist(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """For images of one channel."""
    return create("ninformer_mnist", pretrained, kwargs, img_size=28, in_chans=1, num_classes=10)
