"""Orchid (Karami and Ghodsi, NeurIPS 2024, arXiv 2402.18508): a convolution as long as the sequence, made of the input.

`Orchid` takes the place of self-attention in an encoder, (B, L, D) -> (B, L, D) in O(L log L). Three projections of the
input pass a depthwise convolution of width 3; the last is filtered between two gates, all of it over the axis L,

    y = x_0 * irfft[ rfft(x_1 * x_2) (rfft(k) / L + H(x)) ],    out = W (y + k' conv x).

k is fixed: a small MLP of the position under an exponential window, as in Hyena. H is made from the input c: type I
convolves the power spectrum |rfft v|^2 of v = LN conv c over frequencies to real and imaginary parts; type II is the
cross-correlation conj(rfft k) rfft q of two such sequences. Both ignore where a pattern stands, so that the filter
turns with the input and the whole is equivariant to shifts (with circular padding). `orchid_vit_*` is timm's ViT with
it and the mean of all tokens; the paper published no weights and no counts to the unit.

Departures: the spectrum is orthonormal before its layer norm (divided by L, as in the authors' code, its values fall
under the norm's epsilon and H dies on long sequences); the transform runs in float32 whatever the rest runs in, and as
a product with DFT matrices in an ONNX graph, where lengths are those of an image.

When not to use it: for generation (the filter is computed from the whole sequence, the future included: refused); on
short sequences, where attention is faster and better understood; to add or drop tokens midway, as VPT does.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from foveal.architectures._registry import register_model
from foveal.architectures._spectrum import waves
from foveal.core.errors import BackboneError

Adaptive = Literal["I", "II", "none"]


FREQUENCY = 10.0
"""Where w, the frequencies of a fixed kernel's sines, starts."""


def rfft_pair(x: Tensor, dense: bool | None = None) -> tuple[Tensor, Tensor]:
    """Real sequences [..., L] -> real and imaginary parts [..., L // 2 + 1], float32, orthonormal.

    Args:
        dense: multiply by DFT matrices, O(L^2), rather than transform fast; None: only in an export to ONNX.
    """
    x = x.float()
    if not (torch.onnx.is_in_onnx_export() if dense is None else dense):
        z = torch.fft.rfft(x, norm="ortho")
        return z.real, z.imag
    length = int(x.shape[-1])
    cos, sin = waves(length, length // 2 + 1, x)
    return x @ cos, -(x @ sin)


def irfft_pair(real: Tensor, imaginary: Tensor, length: int, dense: bool | None = None) -> Tensor:
    """Inverse of `rfft_pair`: parts [..., L // 2 + 1] -> real sequences [..., L], float32."""
    if not (torch.onnx.is_in_onnx_export() if dense is None else dense):
        return torch.fft.irfft(torch.complex(real, imaginary), n=length, norm="ortho")
    cos, sin = waves(length, length // 2 + 1, real)
    frequency = torch.arange(length // 2 + 1, device=real.device)
    twice = torch.where((frequency == 0) | (2 * frequency == length), 1.0, 2.0)  # a bin stands for its mirror too
    return (real * twice) @ cos.transpose(0, 1) - (imaginary * twice) @ sin.transpose(0, 1)


def filter_sequence(x: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Multiply the spectra of sequences [..., L] by a + ib [..., L // 2 + 1]: a convolution that wraps around."""
    length = int(x.shape[-1])
    if torch.onnx.is_in_onnx_export():
        a, b = rfft_pair(x)
        return irfft_pair(a * real - b * imaginary, a * imaginary + b * real, length)
    return torch.fft.irfft(torch.fft.rfft(x.float()) * torch.complex(real, imaginary), n=length)


class StaticKernel(nn.Module):
    """A learned kernel that no input changes: L -> spectrum of k / L, [D, L // 2 + 1] twice, and a skip weight [D].

    k(t) = MLP(t, cos 2 pi t, sin 2 pi t) exp(-|delta_d| t), t = position / (l_max - 1), with sin(w x) between the
    layers and w learned. The window of channel d falls to 0.01 between 0.3 and 1.5 of l_max.
    """

    def __init__(self, dim: int, order: int = 64) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((order,), FREQUENCY))
        self.hidden = nn.ModuleList([nn.Linear(3, order), nn.Linear(order, order), nn.Linear(order, order)])
        self.last = nn.Linear(order, dim, bias=False)
        self.bias = nn.Parameter(torch.randn(dim))

    def init_weights(self) -> None:
        """torch's own initialisation; a ViT's, a hundredth of it, would leave the sines in their linear part."""
        for layer in (*self.hidden, self.last):
            layer.reset_parameters()  # pyright: ignore[reportCallIssue]
        nn.init.constant_(self.freq, FREQUENCY)
        nn.init.normal_(self.bias)

    def kernel(self, length: int, l_max: int) -> Tensor:
        """k at the first `length` positions, [D, length]."""
        t = torch.arange(length, device=self.bias.device, dtype=torch.float32)[:, None] / max(l_max - 1, 1)
        turn = 2 * math.pi * t
        x = torch.cat([t, turn.cos(), turn.sin()], dim=1).to(self.bias)
        for layer in self.hidden:
            x = torch.sin(self.freq * layer(x))
        k = self.last(x).float()
        delta = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, k.shape[1], device=k.device)
        return (k * (-t * delta).exp()).transpose(0, 1)

    def forward(self, length: int, l_max: int) -> tuple[Tensor, Tensor]:
        real, imaginary = rfft_pair(self.kernel(length, l_max))
        return real * length**-0.5, imaginary * length**-0.5


class AdaptiveKernel(nn.Module):
    """Conditioning sequences [B, L, D] -> the filter's spectrum H, real and imaginary [B, D, L // 2 + 1].

    Args:
        adaptive: 'I' (power spectrum, convolved over frequencies) or 'II' (cross-correlation).
        padding_mode: of the convolutions over the axis L, 'zeros' or 'circular'.
    """

    def __init__(
        self, dim: int, adaptive: Literal["I", "II"] = "I", padding_mode: Literal["zeros", "circular"] = "zeros"
    ) -> None:
        super().__init__()
        conv = partial(nn.Conv1d, dim, dim, 3, padding=1, groups=dim, padding_mode=padding_mode)
        self.adaptive = adaptive
        self.conv = conv()
        self.norm = nn.LayerNorm(dim)
        if adaptive == "I":
            self.frequency_conv = nn.Conv1d(dim, 2 * dim, 3, padding=1, groups=dim)
            self.frequency_norm = nn.LayerNorm(2 * dim)
        else:
            self.query_conv = conv()
            self.query_norm = nn.LayerNorm(dim)

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        c = c.transpose(1, 2)
        a, b = rfft_pair(self.norm(self.conv(c).transpose(1, 2)).transpose(1, 2))
        if self.adaptive == "II":
            p, q = rfft_pair(self.query_norm(self.query_conv(c).transpose(1, 2)).transpose(1, 2))
            return a * p + b * q, a * q - b * p
        power = (a.square() + b.square()).to(self.frequency_conv.weight.dtype)
        z = self.frequency_norm(self.frequency_conv(power).transpose(1, 2)).transpose(1, 2).float()
        return z[:, 0::2], z[:, 1::2]


class Orchid(nn.Module):
    """Sequences [B, L, D] -> [B, L, D], L at most `l_max`; the equation in this file's docstring.

    Args:
        l_max: the length over which the fixed kernels' positions run from 0 to 1.
        adaptive: how the filter depends on the input: 'I', 'II', or 'none' (fixed kernels alone).
        filter_order: width of the MLP that makes a fixed kernel.
        residual: add a fixed long convolution of the input.
        circular: all short convolutions wrap around too, which makes the layer equivariant to shifts.

    Raises:
        BackboneError: an unknown type, or a sequence longer than `l_max`, empty, or used causally.
    """

    def __init__(
        self,
        dim: int,
        l_max: int,
        adaptive: Adaptive = "I",
        filter_order: int = 64,
        residual: bool = True,
        circular: bool = False,
    ) -> None:
        super().__init__()
        if adaptive not in ("I", "II", "none"):
            raise BackboneError(f"adaptive '{adaptive}': expected 'I', 'II' or 'none'")
        if l_max < 1:
            raise BackboneError(f"l_max {l_max}: expected the length of the longest sequence, at least 1")
        self.l_max = l_max
        self.circular = circular
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_conv = nn.Conv1d(3 * dim, 3 * dim, 3, groups=3 * dim)
        self.static = StaticKernel(dim, filter_order)
        padding_mode = "circular" if circular else "zeros"
        self.adaptive = AdaptiveKernel(dim, adaptive, padding_mode) if adaptive != "none" else None
        self.residual = StaticKernel(dim, filter_order) if residual else None
        self.out_proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor, c: Tensor) -> Tensor:
        """Filter sequences x [B, D, L] by the fixed kernel and the one that c [B, L, D] makes."""
        length = int(x.shape[-1])
        real, imaginary = self.static(length, self.l_max)
        if self.adaptive is not None:
            a, b = self.adaptive(c)
            real, imaginary = real + a, imaginary + b
        return filter_sequence(x, real, imaginary) + self.static.bias[:, None] * x

    def forward(self, u: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """
        Args:
            attn_mask: True for the tokens to keep, [B, L]. The others are zeroed, as what stays of them would enter
                the filter of all.
            is_causal: refused; here because timm's blocks pass it.
        """
        length = int(u.shape[1])
        if is_causal:
            raise BackboneError("Orchid cannot be causal: its kernel is computed from the whole sequence; it leaks")
        if not 1 <= length <= self.l_max:
            raise BackboneError(f"sequence of {length} tokens: expected 1 to l_max = {self.l_max}; build it longer")
        kept = None
        if attn_mask is not None:
            if attn_mask.shape != u.shape[:2]:
                raise BackboneError(
                    f"attn_mask of shape {tuple(attn_mask.shape)}: expected one entry a token, {tuple(u.shape[:2])}"
                )
            kept = attn_mask[..., None].to(u)
            u = u * kept
        p = self.in_proj(u)
        if kept is not None:
            p = p * kept
        c = p[..., -u.shape[2] :]
        p = F.pad(p.transpose(1, 2), (2, 0), mode="circular" if self.circular else "constant")
        x0, x1, y = self.short_conv(p).chunk(3, dim=1)
        y = x0 * self.mix(y * x1, c).to(x0.dtype)
        if self.residual is not None:
            long = u.transpose(1, 2)
            moved = filter_sequence(long, *self.residual(length, self.l_max)) + self.residual.bias[:, None] * long
            y = y + moved.to(y.dtype)
        y = self.out_proj(y.transpose(1, 2))
        return y if kept is None else y * kept


class OrchidBlock(Block):
    """timm's ViT block with `Orchid` where attention was."""

    def __init__(self, dim: int, num_heads: int, l_max: int, adaptive: Adaptive = "I", **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.attn = Orchid(dim, l_max, adaptive)


class OrchidViT(VisionTransformer):
    """timm's `VisionTransformer` with Orchid blocks over the patches in row-major order, and their mean.

    Args:
        adaptive: as `Orchid`'s.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        adaptive: Adaptive = "I",
        class_token: bool = False,
        global_pool: Any = "avg",
        dynamic_img_size: bool = False,
        **kwargs: Any,
    ) -> None:
        if dynamic_img_size:
            raise BackboneError("dynamic_img_size: Orchid's kernels have a length; call set_input_size instead")
        height, width, rows, columns = (int(side) for pair in (img_size, patch_size) for side in to_2tuple(pair))
        l_max = (height // rows) * (width // columns) + class_token
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            class_token=class_token,
            global_pool=global_pool,
            block_fn=partial(OrchidBlock, l_max=l_max, adaptive=adaptive),  # pyright: ignore[reportArgumentType]
            **kwargs,
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size from now on; the fixed kernels are stretched to the new length."""
        super().set_input_size(img_size, patch_size)
        for block in self.blocks:
            mixer: Any = block.attn
            mixer.l_max = self.patch_embed.num_patches + self.num_prefix_tokens

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token"} & dict(self.named_parameters()).keys()


def _cfg(size: int = 224, **more: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2402.18508",
        "paper_name": "Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling",
        "origin_url": "https://github.com/Karami-m/orchid",
        **more,
    }


default_cfgs = generate_default_cfgs(
    {
        "orchid_vit_tiny_patch4_32": _cfg(32, num_classes=10, crop_pct=1.0),
        "orchid_vit_tiny_patch16_224": _cfg(),
        "orchid_vit_small_patch16_224": _cfg(),
        "orchid_vit_base_patch16_224": _cfg(),
    }
)


def create(variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any) -> OrchidViT:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(OrchidViT, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})


@register_model
def orchid_vit_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> OrchidViT:
    """For images of 32 pixels."""
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return create("orchid_vit_tiny_patch4_32", pretrained, kwargs, **shape)


@register_model
def orchid_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> OrchidViT:
    return create("orchid_vit_tiny_patch16_224", pretrained, kwargs, embed_dim=192, depth=12, num_heads=3)


@register_model
def orchid_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> OrchidViT:
    return create("orchid_vit_small_patch16_224", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def orchid_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> OrchidViT:
    return create("orchid_vit_base_patch16_224", pretrained, kwargs, embed_dim=768, depth=12, num_heads=12)
