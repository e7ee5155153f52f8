"""PatchConvNet (Touvron et al., 2021, arXiv 2112.13692): one resolution, two knobs, and a map of where it looked.

Four 3x3 convolutions of stride 2 make patches of 16 pixels; then `depth` equal blocks of width d on the same grid,

    x <- x + g * W_2 SE(gelu(DW_3x3 gelu(W_1 LN x))),     g = 1e-4 or 1e-6 per channel at the start;

then attention takes the place of average pooling: one class token c, one head, one block,

    a = softmax(q(LN c) k(LN [c, x])^T / sqrt(d)),   c <- c + g_1 W (a v),   c <- c + g_2 MLP(LN c),   logits = W LN c.

The one head is deliberate: a, without its first entry, is a map over the patches (`attention_maps`). The multi-class
variant has a token, a map and a row of the classifier for every class, and its keys and values are patches alone.
`attention_pool` puts the same aggregation in place of the average pooling of any timm convnet.

Departures: maps keep their own shape, so that oblong images work (the authors' code takes the root of the number of
patches); with `num_classes=0` the multi-class variant keeps one token. No weights were ever released.

When not to use it: where latency on small devices decides (one resolution throughout means a 60 times repeated
384-wide block); when maps must name a class but the single-token variant is trained (its map is of the decision as a
whole); `attention_pool` on fewer than a few hundred images, where it over-fits and average pooling is as good.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, LayerScale, LayerScale2d, Mlp, SqueezeExcite, trunc_normal_
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from foveal.architectures._isotropic import Isotropic, build_isotropic, quarters
from foveal.architectures._pyramid import cfg
from foveal.architectures._registry import register_model
from foveal.core.errors import BackboneError


class PatchConvBlock(nn.Module):
    """x + g f(LN x) on maps [B, d, h, w]; the equation in this file's docstring."""

    def __init__(self, dim: int, drop_path: float = 0.0, init_values: float = 1e-6) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.mix = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
            nn.GELU(),
            SqueezeExcite(dim, rd_ratio=0.25),
            nn.Conv2d(dim, dim, 1),
        )
        self.ls = LayerScale2d(dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls(self.mix(self.norm(x))))


class AggregationPool(nn.Module):
    """Maps [B, d, h, w] -> class tokens after one block of attention and a layer norm: [B, d], or [B, K, d].

    Args:
        classes: None for one token, which also attends to itself; else K tokens that attend to patches alone.
        init_values: start of both layer scales.
        keepdim: give [B, d, 1, 1], as the heads of some convnets expect.
    """

    def __init__(
        self,
        dim: int,
        classes: int | None = None,
        mlp_ratio: float = 3.0,
        init_values: float = 1e-6,
        keepdim: bool = False,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.keepdim = keepdim
        self.cls_token = nn.Parameter(torch.zeros(1, classes or 1, dim))
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values)
        self.norm = LayerNorm(dim, eps=1e-6)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps -> class tokens [B, K, d], what they read [B, n, d], and weights [B, K, n]; n is h w or 1 + h w."""
        tokens = self.cls_token.expand(x.shape[0], -1, -1)
        patches = self.norm1(x.flatten(2).transpose(1, 2))
        queries = self.norm1(tokens)
        read = torch.cat([queries, patches], dim=1) if self.classes is None else patches
        scores = self.q(queries) @ self.k(read).transpose(1, 2) * x.shape[1] ** -0.5
        return tokens, read, scores.softmax(-1)

    def maps(self, x: Tensor) -> Tensor:
        """Maps [B, d, h, w] -> weight of every patch, [B, K, h, w]; with one token they sum to less than 1."""
        weights = self.attend(x)[2]
        return weights[..., -x.shape[2] * x.shape[3] :].unflatten(2, (x.shape[2], x.shape[3]))

    def forward(self, x: Tensor) -> Tensor:
        tokens, read, weights = self.attend(x)
        tokens = tokens + self.ls1(self.proj(weights @ self.v(read)))
        tokens = self.norm(tokens + self.ls2(self.mlp(self.norm2(tokens))))
        if self.classes is not None:
            return tokens
        return tokens[:, 0, :, None, None] if self.keepdim else tokens[:, 0]


class AggregationHead(nn.Module):
    """`AggregationPool`, then a linear classifier; with a token for every class, its own row on its own token."""

    def __init__(self, dim: int, num_classes: int, per_class: bool, drop_rate: float, **pool: Any) -> None:
        super().__init__()
        self.num_features = dim
        self.per_class = per_class
        self.options = pool
        self.drop = nn.Dropout(drop_rate)
        self.pool: nn.Module = nn.Identity()
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes, "attn")

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; the pooling stays unless the number of tokens changes, or `global_pool` is ''."""
        if global_pool not in (None, "", "attn"):
            raise BackboneError(f"global_pool '{global_pool}': PatchConvNet pools by attention ('attn'), or not ('')")
        old = next(iter(self.parameters()), None)
        classes = num_classes if self.per_class and num_classes else None
        if global_pool == "":
            self.pool = nn.Identity()
        elif global_pool == "attn" or (isinstance(self.pool, AggregationPool) and self.pool.classes != classes):
            self.pool = AggregationPool(self.num_features, classes, **self.options)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc.apply(init_linear)
        if old is not None:
            self.to(old)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.pool(x))
        if pre_logits or isinstance(self.pool, nn.Identity):
            return x
        if x.ndim == 3 and isinstance(self.fc, nn.Linear):
            return (x * self.fc.weight).sum(-1) + self.fc.bias
        return self.fc(x)


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class PatchConvNet(Isotropic):
    """PatchConvNet; arguments not named here are those of every timm model. Feature maps are tapped at four depths.

    Args:
        embed_dim: d, a multiple of 8.
        per_class: a class token, a map and a separate classifier row for every class.
        init_values: start of all layer scales.
        drop_path_rate: of every block of the trunk, the same at all depths.

    Raises:
        BackboneError: a width that 8 does not divide, fewer than four blocks, or an image under 16 pixels.
    """

    title = "PatchConvNet"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "attn",
        embed_dim: int = 384,
        depth: int = 60,
        per_class: bool = False,
        mlp_ratio: float = 3.0,
        init_values: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if embed_dim % 8 or embed_dim < 8:
            raise BackboneError(f"embed_dim {embed_dim}: the stem's widths are d/8, d/4, d/2, d: give a multiple of 8")
        widths = (in_chans, embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim)
        stem = nn.Sequential()
        for index in range(4):
            stem.append(nn.Conv2d(widths[index], widths[index + 1], 3, stride=2, padding=1, bias=False))
            stem.append(nn.GELU() if index < 3 else nn.Identity())
        stages = quarters(depth, lambda _: PatchConvBlock(embed_dim, drop_path_rate, init_values))
        head = AggregationHead(
            embed_dim, num_classes, per_class, drop_rate, mlp_ratio=mlp_ratio, init_values=init_values
        )
        super().__init__(stem, stages, head, embed_dim=embed_dim, in_chans=in_chans, num_classes=num_classes)
        if global_pool != "attn":
            self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        return {"head.pool.cls_token"} & dict(self.named_parameters()).keys()


def attention_pool(model: nn.Module, mlp_ratio: float = 3.0, init_values: float = 1e-4) -> nn.Module:
    """A copy of a timm convnet whose global pooling is an `AggregationPool` over its last map.

    Args:
        model: with one `SelectAdaptivePool2d` (ResNet, EfficientNet, ConvNeXt, RegNet, ...) of `num_features` channels.

    Raises:
        BackboneError: the model pools otherwise, or not at all.
    """
    model = copy.deepcopy(model)
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, SelectAdaptivePool2d)]
    if len(found) != 1 or not found[0][1].pool_type:
        raise BackboneError(
            f"{type(model).__name__} has {len(found)} layers that pool a map"
            f"{', switched off' if found and not found[0][1].pool_type else ''}: expected one, as in resnet50; a model "
            "that already gives pooled features has no map left to attend to"
        )
    name, old = found[0]
    width: Any = model.num_features
    like = next(model.parameters())
    pool = AggregationPool(
        width, mlp_ratio=mlp_ratio, init_values=init_values, keepdim=not isinstance(old.flatten, nn.Flatten)
    )
    model.set_submodule(name, pool.to(like).train(model.training))
    return model


def attention_maps(model: nn.Module, images: Tensor, target: int | None = None) -> Tensor:
    """Where a PatchConvNet, or a model of `attention_pool`, looked: images [B, 3, H, W] -> [B, h, w], sums up to 1.

    Args:
        target: the class whose map is wanted, of a multi-class variant; None for the map of a single token.

    Raises:
        BackboneError: the model does not pool by attention, or has no map for that class.
    """
    pool = next((each for each in model.modules() if isinstance(each, AggregationPool)), None)
    if pool is None:
        raise BackboneError(
            f"{type(model).__name__} does not pool by attention: use attention_pool(model), and train it"
        )
    if target is not None and pool.classes is None:
        raise BackboneError(
            f"a map for class {target} of a single-token model: it has one map for all classes; "
            "train the multi-class variant (patchconvnet_s60_multi)"
        )
    if pool.classes is not None and (target is None or not 0 <= target < pool.classes):
        raise BackboneError(f"target {target}: the model has maps for the classes 0 to {pool.classes - 1}, name one")
    features: Any = model
    return pool.maps(features.forward_features(images))[:, target or 0]


def _cfg() -> dict[str, Any]:
    return cfg(
        pool_size=(14, 14),
        paper_ids="arXiv:2112.13692",
        paper_name="Augmenting Convolutional networks with attention-based aggregation",
        origin_url="https://github.com/facebookresearch/deit",
    )


SIZES = ("s60", "s120", "b60", "b120", "l60", "l120", "s60_multi")
default_cfgs = generate_default_cfgs({f"patchconvnet_{size}": _cfg() for size in SIZES})


@register_model
def patchconvnet_s60(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_isotropic(
        PatchConvNet, "patchconvnet_s60", pretrained, kwargs, embed_dim=384, depth=60, init_values=1e-4
    )


@register_model
def patchconvnet_s120(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_isotropic(PatchConvNet, "patchconvnet_s120", pretrained, kwargs, embed_dim=384, depth=120)


@register_model
def patchconvnet_b60(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_isotropic(PatchConvNet, "patchconvnet_b60", pretrained, kwargs, embed_dim=768, depth=60)


@register_model
def patchconvnet_b120(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_isotropic(PatchConvNet, "patchconvnet_b120", pretrained, kwargs, embed_dim=768, depth=120)


@register_model
def patchconvnet_l60(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_isotropic(PatchConvNet, "patchconvnet_l60", pretrained, kwargs, embed_dim=1024, depth=60)


@register_model
def patchconvnet_l120(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    return build_isotropic(PatchConvNet, "patchconvnet_l120", pretrained, kwargs, embed_dim=1024, depth=120)


@register_model
def patchconvnet_s60_multi(pretrained: bool = False, **kwargs: Any) -> PatchConvNet:
    """A class token and an attention map for every class."""
    return build_isotropic(
        PatchConvNet, "patchconvnet_s60_multi", pretrained, kwargs, embed_dim=384, depth=60, per_class=True
    )
