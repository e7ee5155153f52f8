"""SGConv (Li et al., ICLR 2023, arXiv 2210.09298): a convolution as long as the signal from few, decaying parameters.

Two principles make long kernels work: parameters that grow with log L, and weights that fall with distance. S short
kernels w_0 .. w_{S-1} of d values are stretched linearly to lengths d, d, 2d, 4d, .., the farther ones made smaller,

    k = [2^{S-1} up(w_0), 2^{S-2} up(w_1), .., up(w_{S-1})] / Z,    y = irfft(rfft u rfft k) + D u,   O(L log L),

Z being each channel's norm at the start, kept. `SGConv` is the layer, (B, L, H) -> (B, L, H), with GELU and a linear
mix of channels behind it; `SGConvNet` is the paper's model for long signals. `sgconvnext_*` is timm's ConvNeXt whose
7 x 7 depthwise convolutions became `GlobalConv`s over the flattened map, both ways.

Departures: Z is taken when the layer is made, not on the first forward (the same number, and a model can be exported
before it ever ran); the transform runs in float32 whatever the rest runs in; in an ONNX graph the convolution is one
direct Conv, O(L^2). The kernel size of `sgconvnext_*` is not published: 16 gives the published sizes within a million.

When not to use it: on images as such (row-major order tears the columns apart: `convnext_*` and `unireplknet_*` see as
far in two dimensions); on signals longer than `l_max` (no context beyond the kernel: build it longer); without a rate
of its own for the kernels (about 1e-3, no weight decay: they are in `no_weight_decay`).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from foveal.architectures._pyramid import cfg
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


def scales(l_max: int, kernel_dim: int) -> int:
    """S: how many sub-kernels of `kernel_dim` values reach `l_max`.

    Raises:
        BackboneError: l_max < kernel_dim.
    """
    if kernel_dim < 1 or l_max < kernel_dim:
        raise BackboneError(f"l_max {l_max} is shorter than kernel_dim {kernel_dim}: expected at least one sub-kernel")
    return 1 + math.ceil(math.log2(l_max / kernel_dim))


def stretch(parts: Tensor, decay: tuple[float, float]) -> Tensor:
    """Sub-kernels [S, C, H, d] -> kernel [C, H, d 2^(S-1)], not yet divided by Z.

    Args:
        decay: how much smaller each farther scale is, in the first and in the last of the H channels.
    """
    count, channels, width, size = parts.shape
    smaller = torch.linspace(*decay, width, device=parts.device).float()[:, None]
    pieces = [
        F.interpolate(part, scale_factor=2 ** max(0, i - 1), mode="linear") * smaller ** (count - 1 - i)
        for i, part in enumerate(parts.float())
    ]
    return torch.cat(pieces, dim=-1).float().view(channels, width, size * 2 ** (count - 1))


def convolve(u: Tensor, k: Tensor, back: Tensor | None = None, direct: bool | None = None) -> Tensor:
    """Signals u [B, H, L] by kernels k [C, H, L'] -> [B, C, H, L], float32; causal: k[j] weighs what came j before.

    Args:
        back: kernels for what comes after: back[j] weighs what comes j + 1 later.
        direct: one convolution, O(L^2), rather than transforms, O(L log L); None: only in an export to ONNX.
    """
    u = u.float()
    length = int(u.shape[-1])
    k = F.pad(k[..., :length], (0, max(length - int(k.shape[-1]), 0)))
    if back is not None:
        back = F.pad(back[..., : length - 1], (0, max(length - 1 - int(back.shape[-1]), 0)))
    if torch.onnx.is_in_onnx_export() if direct is None else direct:
        channels, width = int(k.shape[0]), int(k.shape[1])
        right = k.new_zeros(channels, width, length - 1) if back is None else back
        both = torch.cat([k.flip(-1), right], dim=-1)  # from the farthest past to the farthest future
        both = both.transpose(0, 1).reshape(width * channels, 1, 2 * length - 1)
        y = F.conv1d(u, both, padding=length - 1, groups=width)
        return y.reshape(-1, width, channels, length).transpose(1, 2)
    size = 2 * length
    k = F.pad(k, (0, length))
    if back is not None:
        k = k + F.pad(back.flip(-1), (length + 1, 0))
    spectrum = torch.fft.rfft(u, n=size).unsqueeze(1) * torch.fft.rfft(k, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :length]


class GlobalConv(nn.Module):
    """Signals [B, H, L] -> [B, C H, L]: each by its own long kernel, and D times itself.

    Args:
        l_max: the length that the kernel covers; shorter signals use its start, longer ones see no farther.
        kernel_dim: d, values of each sub-kernel.
        channels: C, kernels per signal.
        bidirectional: look ahead as well, by a second kernel.
        decay: as `stretch`; 2 halves every scale, 1 switches the decay off.
        causal: only says what `bidirectional` contradicts.

    Raises:
        BackboneError: causal and bidirectional at once, or l_max < kernel_dim.
    """

    kernel_norm: Tensor

    def __init__(
        self,
        dim: int,
        l_max: int,
        kernel_dim: int = 32,
        channels: int = 1,
        bidirectional: bool = True,
        decay: tuple[float, float] = (2.0, 2.0),
        causal: bool = False,
    ) -> None:
        super().__init__()
        if causal and bidirectional:
            raise BackboneError("causal=True with bidirectional=True: the second kernel looks ahead; choose one")
        self.channels = channels
        self.decay = decay
        self.bidirectional = bidirectional
        both = channels * (2 if bidirectional else 1)
        self.kernel = nn.Parameter(torch.empty(scales(l_max, kernel_dim), both, dim, kernel_dim))
        self.D = nn.Parameter(torch.empty(channels, dim))
        self.register_buffer("kernel_norm", torch.empty(both, dim, 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.kernel)
        nn.init.normal_(self.D)
        self.kernel_norm.copy_(stretch(self.kernel, self.decay).norm(dim=-1, keepdim=True))

    @property
    def reach(self) -> int:
        """How far the kernel looks: d 2^(S-1)."""
        return int(self.kernel.shape[-1]) * 2 ** (len(self.kernel) - 1)

    def kernels(self) -> Tensor:
        """The whole kernel, divided by Z: [C or 2 C, H, reach]."""
        return stretch(self.kernel, self.decay) / self.kernel_norm

    def forward(self, u: Tensor) -> Tensor:
        if u.shape[-1] > self.reach:
            warnings.warn(
                f"signal of {u.shape[-1]} values, kernel of {self.reach}: no context beyond the kernel", stacklevel=2
            )
        k, *back = self.kernels().split(self.channels)
        y = convolve(u, k, back[0] if back else None) + self.D[..., None] * u[:, None]
        return y.flatten(1, 2).to(u.dtype)


class SGConv(nn.Module):
    """Sequences [B, L, H] -> [B, L, H]: `GlobalConv`, GELU, dropout, and a linear mix of channels.

    Args and errors are those of `GlobalConv`.
    """

    def __init__(self, dim: int, l_max: int, kernel_dim: int = 32, channels: int = 1, drop: float = 0.0, **kwargs: Any):
        super().__init__()
        self.conv = GlobalConv(dim, l_max, kernel_dim, channels, **kwargs)
        self.drop = nn.Dropout(drop)
        self.proj = nn.Linear(channels * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.drop(F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2))))


class SGConvNet(nn.Module):
    """Long signals [B, L, in_width] -> logits [B, classes]: linear, `depth` residual mixers, mean over L, linear.

    Args:
        mixer: what makes a layer [B, L, width] -> [B, L, width]; None for `SGConv(width, l_max)`.
    """

    def __init__(
        self,
        in_width: int,
        classes: int,
        l_max: int,
        width: int = 128,
        depth: int = 6,
        drop: float = 0.0,
        mixer: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        mixer = mixer or (lambda: SGConv(width, l_max, drop=drop))
        self.encoder = nn.Linear(in_width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(mixer() for _ in range(depth))
        self.drop = nn.Dropout(drop)
        self.decoder = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + self.drop(mixer(norm(x)))
        return self.decoder(x.mean(1))


class MapConv(GlobalConv):
    """`GlobalConv` over the rows of a map, one after another: [B, d, h, w] -> [B, d, h, w]."""

    def forward(self, u: Tensor) -> Tensor:
        height, width = int(u.shape[2]), int(u.shape[3])
        return super().forward(u.flatten(2)).reshape(-1, u.shape[1], height, width)


class SGConvNeXt(ConvNeXt):
    """timm's `ConvNeXt` with long convolutions over the flattened maps.

    Args:
        img_size: the image size that the kernels cover.
        kernel_dim: d.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, kernel_dim: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        height, width = (int(side) for side in to_2tuple(img_size))
        for stage, info in zip(self.stages, self.feature_info, strict=True):
            cells = -(-height // info["reduction"]) * -(-width // info["reduction"])
            each: Any = stage
            for block in each.blocks:
                block.conv_dw = MapConv(info["num_chs"], max(cells, kernel_dim), kernel_dim)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".kernel", ".D"))}


default_cfgs = generate_default_cfgs(
    {
        f"sgconvnext_{size}": cfg(
            paper_ids="arXiv:2210.09298",
            paper_name="What Makes Convolutional Models Great on Long Sequence Modeling?",
            origin_url="https://github.com/ctlllll/SGConv",
            fixed_input_size=True,
        )
        for size in ("tiny", "small", "base")
    }
)


def create(variant: str, pretrained: bool, given: dict[str, Any], **defaults: Any) -> SGConvNeXt:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(SGConvNeXt, variant, pretrained, feature_cfg=feature_cfg, **{**defaults, **given})


@register_model
def sgconvnext_tiny(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    return create("sgconvnext_tiny", pretrained, kwargs, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))


@register_model
def sgconvnext_small(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    return create("sgconvnext_small", pretrained, kwargs, depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))


@register_model
def sgconvnext_base(pretrained: bool = False, **kwargs: Any) -> SGConvNeXt:
    return create("sgconvnext_base", pretrained, kwargs, depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
