"""The frame that the hierarchies of this room share: stem, stages, norm, head, and timm's manners around them."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, LayerNorm2d, NormMlpClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from foveal.core.errors import BackboneError


class Stage(nn.Module):
    """`downsample`, then `blocks`, then `norm`: maps [B, C, H, W] -> [B, D, H / s, W / s]."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def run(self, x: Tensor) -> Tensor:
        """The blocks, one after the other; with `grad_checkpointing` each is run again for its gradients."""
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run(self.downsample(x)))


class Pyramid(nn.Module):
    """Images [B, in_chans, H, W] -> `stem` -> `stages` -> `norm` -> `head` -> logits [B, num_classes].

    A subclass gives the parts; this class gives what timm's users expect of a model.

    Attributes:
        feature_info: channels and stride of the map after every stage.
        num_features: channels of the last map.
        head_hidden_size: length of the vector that the classifier reads.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        head: nn.Module,
        *,
        dims: Sequence[int],
        strides: Sequence[int],
        in_chans: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head: Any = head
        self.num_features = dims[-1]
        self.head_hidden_size = self.head.num_features
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{index}"}
            for index, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]

    def check_input(self, height: int, width: int) -> None:
        """Refuse an image size that the architecture cannot take; any size is taken unless a subclass says no.

        Raises:
            BackboneError: the size, and the nearest ones that work.
        """

    def run(self, x: Tensor, count: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Images -> the map after each of the first `count` stages, and what `norm` reads: the last of them."""
        self.check_input(int(x.shape[-2]), int(x.shape[-1]))
        x = self.stem(x)
        maps: list[Tensor] = []
        for stage in self.stages[:count]:
            x = stage(x)
            maps.append(x)
        return maps, x

    def as_map(self, final: Tensor, like: Tensor) -> Tensor:
        """What `norm` made, as a map of the size of `like`; other than itself where it holds tokens."""
        return final

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> the last stage's map [B, num_features, H / 32, W / 32], normalised."""
        return self.norm(self.run(x)[1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave -> logits, or with `pre_logits` the vector that the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after chosen stages (all if `indices` is None), beside the final features unless told otherwise."""
        if output_fmt != "NCHW":
            raise BackboneError(f"output_fmt '{output_fmt}': feature maps of {type(self).__name__} are NCHW")
        taken, last = feature_take_indices(len(self.stages), indices)  # pyright: ignore[reportArgumentType]
        maps, final = self.run(x, last + 1 if stop_early or intermediates_only else None)
        whole = len(maps) == len(self.stages)
        if whole and (norm or not intermediates_only):
            final = self.norm(final)
        top = len(self.stages) - 1 if norm else -1
        chosen = [self.as_map(final, maps[index]) if index == top else maps[index] for index in taken]
        return chosen if intermediates_only else (final, chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, and what reads them."""
        taken, last = feature_take_indices(len(self.stages), indices)  # pyright: ignore[reportArgumentType]
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.head = ClassifierHead(self.num_features, 0, pool_type="")
            self.num_classes, self.head_hidden_size = 0, self.num_features
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of `num_classes` rows, none if 0; `global_pool` as timm names them ('' for none)."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def reparameterize(self) -> None:
        """Merge what only training needs into what it stands beside, in place: batch norms into convolutions.

        What the model computes in eval mode stays. Nothing happens where there is nothing to merge.
        """
        merges: list[Any] = [each for each in self.modules() if each is not self and hasattr(each, "reparameterize")]
        for module in merges:
            module.reparameterize()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        by_block = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else by_block}

    def no_weight_decay(self) -> set[str]:
        return set()


def build_pyramid(
    cls: type[Pyramid], variant: str, pretrained: bool, defaults: dict[str, Any], given: dict[str, Any], **more: Any
) -> Any:
    """timm's way from a variant's defaults and the caller's arguments to a model; `features_only` works."""
    refuse_pretrained(variant, pretrained, given)
    feature_cfg = {"out_indices": tuple(range(len(defaults["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=feature_cfg, **more, **{**defaults, **given})


def refuse_pretrained(variant: str, pretrained: bool, given: Mapping[str, Any]) -> None:
    """
    Raises:
        BackboneError: pretrained weights of a variant that has none, with no file of the caller's own to read.
    """
    if pretrained and not (given.get("pretrained_cfg") or given.get("pretrained_cfg_overlay")):
        raise BackboneError(
            f"{variant} with pretrained=True: no weights are published for it; use pretrained=False (foveal fit "
            f"--scratch), or load a file of your own as {variant}@FILE.safetensors"
        )


def cfg(first_conv: str = "stem.0", classifier: str = "head.fc", size: int = 224, **more: Any) -> dict[str, Any]:
    """timm's description of a variant. No weights are published under a licence and address that timm could load."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **more,
    }


def pooled_head(dim: int, num_classes: int, global_pool: str, drop_rate: float, eps: float | None = None) -> nn.Module:
    """Pool and classify; with `eps` a layer norm stands between the two."""
    if eps is None:
        return ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate)
    norm = partial(LayerNorm2d, eps=eps)
    return NormMlpClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm)


def init_as_convnext(module: nn.Module) -> None:
    """To `apply`: convolutions and linear layers start truncated normal of spread 0.02, without a bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def four(name: str, values: Sequence[int], what: str) -> tuple[int, ...]:
    """`values` as a tuple of four positive whole numbers, one a stage.

    Raises:
        BackboneError: another count, or a number below 1.
    """
    if len(values) != 4 or min(values) < 1:
        raise BackboneError(f"{name}: {what} {tuple(values)}: expected four numbers of at least 1, one a stage")
    return tuple(values)
