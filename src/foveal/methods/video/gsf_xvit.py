"""GSF + XViT (Sudhakaran et al., EPIC-Kitchens challenge 2021, arXiv 2110.02902): video at the cost of images.

A network of images sees T frames of a clip as a batch, and some of its channels step to the neighbouring frames. On
CNNs Gate-Shift-Fuse (arXiv 2203.08897) ends each residual block: of F channels, in halves k = 1, 2,

    y_k = shift(g_k x_k),  r_k = (1 - g_k) x_k,  out_k = w_k y_k + (1 - w_k) r_k,  g = tanh(conv3d(relu(bn(x)))),

y_1 from one frame later and y_2 from one earlier, w_k a gate per channel and frame, the channels then shuffled;
29 F + 40 parameters. On plain ViTs keys and values of frame t are mixed from t + 1, t - 1 and t (XViT, arXiv
2106.05968), with no parameter; a temporal position is added to the tokens, and a small transformer reads the frames.

It needs labelled clips and gradients, on ResNets, RegNets, EfficientNets and MobileNets (GSF) or plain ViTs (XViT);
windowed and hybrid networks can be averaged over frames (`mixer=none`), which is blind to the order.

Where we depart: AdamW with a cosine instead of SGD; F is rounded down to a multiple of 4, as the shuffle needs
(authors' code stops there); the head for actions is the product of the parts' probabilities over the pairs seen in
training; the places of frames start as waves rather than by chance. The report's own ensemble is not known in detail;
two Bundles are fused by `foveal.evaluate.fusion`.

When not to use it: when single frames tell the classes apart (fit a few frames as images, `mixer=none`); for few steps
on small networks without pretraining: given enough they learnt the order on every seed, GSF in 450 steps of 16 clips
and XViT in 1,500, of which it spent half blind to it (see the card); for clips of minutes, or for actions located in
time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveal.blocks.tuning import zero_linear
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.video import ClipClassifier, Video
from foveal.core.method import Recipe, Spec, method, trainable
from foveal.core.options import option, options
from foveal.data.clips import Moment, dense, fold, segments, unfold

FRESH = 2.0
"""How many times faster than the backbone what is new to it learns."""


def shift(x: Float[Tensor, "B T *rest"], later: bool) -> Float[Tensor, "B T *rest"]:
    """Each frame's values from the next frame (`later`) or from the one before; zeros where there is none."""
    rest = [0, 0] * (x.ndim - 2)
    return F.pad(x[:, 1:], [*rest, 0, 1]) if later else F.pad(x[:, :-1], [*rest, 1, 0])


def shuffle(x: Float[Tensor, "B T C H W"]) -> Float[Tensor, "B T C H W"]:
    """Channels (0, 1, ... C-1) in the order 0, C/2, 1, C/2 + 1, ..."""
    return x.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)


class GateShiftFuse(nn.Module):
    """GSF on the first `moving` of C channels: frames [B * T, C, H, W] -> the same shape.

    The 3 x 3 x 3 convolution of the gate is one of 3 x 3 on every frame whose outputs, one for each half and each of
    the frames before, at and after, are then summed over time; batch statistics over frames are those over clips.
    """

    def __init__(self, frames: int, moving: int) -> None:
        super().__init__()
        if moving < 4 or moving % 4:
            raise UsageError(f"{moving} moving channels: GSF shuffles in quarters, expected a multiple of 4")
        self.frames, self.moving = frames, moving
        self.norm = nn.BatchNorm2d(moving)
        self.gate = nn.Conv2d(moving, 6, 3, padding=1, groups=2, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(2, 1, 1))
        self.fuse = nn.ModuleList(nn.Conv2d(2, 1, 3, padding=1) for _ in range(2))

    def gates(self, x: Float[Tensor, "B T F H W"]) -> Float[Tensor, "B T 2 H W"]:
        """One plane in -1..1 for each half of the channels."""
        taps = unfold(self.gate(self.norm(fold(x)).relu()), self.frames).unflatten(2, (2, 3))
        before, at, after = taps.unbind(3)
        return (shift(before, later=False) + at + shift(after, later=True) + self.gate_bias).tanh()

    def weights(self, half: int, y: Float[Tensor, "B T c H W"], r: Float[Tensor, "B T c H W"]) -> Tensor:
        """How much of a half's moved values is kept, [B, T, c, 1, 1] in 0..1."""
        pooled = torch.stack([y.mean((3, 4)), r.mean((3, 4))], 1).transpose(2, 3)  # [B, 2, c, T]
        return self.fuse[half](pooled).sigmoid()[:, 0].transpose(1, 2)[..., None, None]

    def forward(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        clips = unfold(images, self.frames)
        x, still = clips[:, :, : self.moving], clips[:, :, self.moving :]
        g, out = self.gates(x), []
        for half, part in enumerate(x.chunk(2, 2)):
            gated = g[:, :, half : half + 1] * part
            y, r = shift(gated, later=half == 0), part - gated
            w = self.weights(half, y, r)
            out.append(shuffle(w * y + (1 - w) * r))
        return fold(torch.cat([*out, still], 2))


class SpaceTimeMixing(nn.Module):
    """Behind a ViT's qkv layer: the first C / divisor channels of k and of v come from the next frame, as many from
    the one before. [B * T, N, 3 C] -> the same shape; no parameters."""

    def __init__(self, frames: int, width: int, divisor: int) -> None:
        super().__init__()
        self.frames, self.width = frames, width
        self.step = width // divisor if divisor else 0

    def mixed(self, x: Float[Tensor, "M N C"]) -> Float[Tensor, "M N C"]:
        clips, n = unfold(x, self.frames), self.step
        moved = [shift(clips[..., :n], later=True), shift(clips[..., n : 2 * n], later=False), clips[..., 2 * n :]]
        return fold(torch.cat(moved, -1))

    def forward(self, qkv: Float[Tensor, "M N D"]) -> Float[Tensor, "M N D"]:
        if not self.step:
            return qkv
        q, k, v = qkv.split(self.width, -1)
        return torch.cat([q, self.mixed(k), self.mixed(v)], -1)


def parts_of(classes: Sequence[str], separator: str) -> tuple[list[list[str]], Int[Tensor, "K P"]]:
    """Class names such as 'open+door' -> the names of each part, and which of them each class is made of.

    Raises:
        UsageError: names with unequal numbers of parts.
    """
    split = [name.split(separator) if separator else [name] for name in classes]
    if len({len(names) for names in split}) > 1:
        few, many = min(split, key=len), max(split, key=len)
        raise UsageError(
            f"class '{separator.join(few)}' has {len(few)} parts by separator={separator}, "
            f"'{separator.join(many)}' has {len(many)}: expected equally many in each"
        )
    names = [sorted({row[part] for row in split}) for part in range(len(split[0]))]
    index = [[names[part].index(name) for part, name in enumerate(row)] for row in split]
    return names, torch.tensor(index)


class ProductHead(nn.Module):
    """One linear layer per part of a label: features [B, D] -> logits [B, K] of the classes, whose softmax is the
    product of the parts' probabilities over the K pairs that there are."""

    index: Tensor

    def __init__(self, width: int, parts: Sequence[Sequence[str]], index: Int[Tensor, "K P"]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(zero_linear(width, len(names)) for names in parts)
        self.register_buffer("index", index, persistent=False)

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        return torch.stack([layer(features)[:, self.index[:, p]] for p, layer in enumerate(self.layers)]).sum(0)


def part_losses(
    logits: Float[Tensor, "B K"], labels: Int[Tensor, " B"], weights: Float[Tensor, " K"], index: Int[Tensor, "K P"]
) -> Float[Tensor, " P"]:
    """Cross-entropy of each part of the label, under the classes' joint softmax; an image counts by its class."""
    log_p, found = logits.log_softmax(1), []
    for part in index.T:
        same = part[labels][:, None] == part  # [B, K]: classes that share this part with the label
        found.append(-(log_p.masked_fill(~same, -torch.inf).logsumexp(1) * weights[labels]).mean())
    return torch.stack(found)


class FrameAverage(ClipClassifier):
    """The mean of what a backbone makes of the frames, each with dropout (temporal segment networks)."""

    def __init__(self, backbone: nn.Module, frames: int, head: nn.Module, dropout: float) -> None:
        super().__init__(frames, head)
        self.backbone, self.dropout = backbone, nn.Dropout(dropout)

    def features(self, clips: Tensor) -> Tensor:
        return unfold(self.dropout(self.backbone(fold(clips))), self.frames).mean(1)


def waves(places: int, width: int) -> Float[Tensor, "N D"]:
    """Sines and cosines of one to four half turns from the first place to the last, each with a sign by chance:
    neighbours in time start out alike."""
    number = torch.arange(width)
    angle = torch.linspace(0, torch.pi, places)[:, None] * (number % 4 + 1) + torch.pi / 2 * (number // 4 % 2)
    return angle.sin() * torch.where(torch.rand(width) < 0.5, -1.0, 1.0)


class TemporalAttention(ClipClassifier):
    """XViT around a ViT: a position per frame, and one transformer layer over a class token and the frames."""

    def __init__(self, backbone: Any, frames: int, head: nn.Module, dropout: float) -> None:
        from timm.models.vision_transformer import Block

        super().__init__(frames, head)
        self.backbone = backbone
        self.position = nn.Parameter(torch.zeros(frames, 1, backbone.token_width))
        width = backbone.width
        self.token = nn.Parameter(0.5 * torch.randn(1, 1, width))  # not small: equal attention to all frames is blind
        self.place = nn.Parameter(waves(frames + 1, width))  # to their order, and gradients there vanish
        heads = next(count for count in range(max(1, width // 32), 0, -1) if width % count == 0)
        self.over_time = Block(width, heads, mlp_ratio=2.0, qkv_bias=True, proj_drop=dropout)
        self.norm = nn.LayerNorm(width)

    def features(self, clips: Tensor) -> Tensor:
        tokens = unfold(self.backbone.embed(fold(clips)), self.frames) + self.position
        tokens = fold(tokens)
        for block in self.backbone.blocks:
            tokens = block(tokens)
        frames = unfold(self.backbone.finish_tokens(tokens), self.frames)
        sequence = torch.cat([self.token.expand(frames.shape[0], -1, -1), frames], 1) + self.place
        return self.norm(self.over_time(sequence)[:, 0])


@options
class Options:
    """What `gsf-xvit` can be told."""

    mixer: Literal["auto", "gsf", "xvit", "none"] = option(
        "auto", "GSF on CNNs, XViT on plain ViTs; none: frames alone"
    )
    frames: int = option(8, "frames of a clip that are looked at (T)", ge=1, le=256)
    stride: int = option(0, "frames from one to the next; 0: from T equal parts of the clip", ge=0, le=1000)
    share: float = option(0.25, "of the channels, how many move in time (GSF: ratio; XViT: 2 / n_div)", ge=0, le=1)
    dropout: float = option(0.5, "share of features dropped before the head (XViT: a fifth of it)", ge=0, lt=1)
    separator: str = option("", "splits a class name such as open+door into parts with a head each")
    epochs: int = option(10, "passes over the training clips", ge=1, le=10_000)
    lr: float = option(5e-4, "learning rate of the backbone; what is new learns twice as fast", gt=0, le=1)
    batch_size: int = option(8, "clips per step", ge=2, le=4096)
    augment: Literal["none", "light"] = option("light", "random crops, the same for all frames; never mirrored")


@method(
    Spec(
        family="video",
        title="GSF + XViT",
        year=2021,
        arxiv="2110.02902",
        needs=frozenset({"labels", "gradients"}),
        tasks=("video",),
    ),
    Options,
)
class GsfXvit(Video):
    def sample(self, count: int, at: Moment) -> np.ndarray:
        chosen: Options = self.options
        if chosen.stride:
            return dense(count, chosen.frames, chosen.stride, at)
        return segments(count, chosen.frames, at)

    def attach(self, backbone: Any, classes: Sequence[str]) -> ClipClassifier:
        """
        Raises:
            BackboneError: neither residual blocks of convolutions nor a plain ViT, or not what `mixer` asks for.
            UsageError: class names with unequal numbers of parts.
        """
        chosen: Options = self.options
        mixer = chosen.mixer
        if mixer == "auto":
            mixer = "xvit" if backbone.has_tokens else "gsf"
        head = ProductHead(backbone.width, *parts_of(classes, chosen.separator))
        if mixer == "xvit":
            insert_mixing(backbone, chosen.frames, chosen.share)
            return TemporalAttention(backbone, chosen.frames, head, chosen.dropout / 5)
        if mixer == "gsf" and chosen.share:
            insert_gsf(backbone, chosen.frames, chosen.share)
        return FrameAverage(backbone, chosen.frames, head, chosen.dropout)

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = model(batch["clips"])
        index = getattr(model, "module", model).head.index
        parts = part_losses(logits, batch["labels"], batch["class_weights"].to(logits.dtype), index)
        return {"loss": parts.sum(), **{f"part_{number}": part for number, part in enumerate(parts)}}

    def parameter_groups(self, model: ClipClassifier, recipe: Recipe) -> list[dict[str, Any]]:
        """The backbone's own weights at `lr`, all others FRESH times as fast; vectors do not decay."""
        new = {id(p) for module in model.modules() if isinstance(module, GateShiftFuse) for p in module.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in trainable(model):
            fresh = not name.startswith("backbone.") or id(parameter) in new
            groups.setdefault((fresh, parameter.ndim <= 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": recipe.lr * (FRESH if fresh else 1.0),
                "weight_decay": 0.0 if vectors else recipe.weight_decay,
            }
            for (fresh, vectors), parameters in groups.items()
        ]


def insert_gsf(backbone: Any, frames: int, share: float) -> None:
    """Put GSF behind the last convolution of every residual block, before its norm.

    Raises:
        BackboneError: there are none, or none with as many channels.
    """
    ends = [(name, end, int(end.out_channels * share) // 4 * 4) for name, end in backbone.block_ends()]
    if not any(moving for _, _, moving in ends):
        raise BackboneError(f"{backbone.arch} has no block of which a share of {share:g} is 4 channels: raise share")
    for name, end, moving in ends:
        if moving:
            backbone.set_submodule(name, nn.Sequential(end, GateShiftFuse(frames, moving)))


def insert_mixing(backbone: Any, frames: int, share: float) -> None:
    """Put space-time mixing behind the qkv layer of every block.

    Raises:
        BackboneError: no plain ViT, or one without such layers.
    """
    blocks = len(backbone.blocks)
    layers = [f"{name}.qkv" for name, _ in backbone.attention_modules() if name.startswith("model.blocks.")]
    layers = [name for name in layers if isinstance(dict(backbone.named_modules()).get(name), nn.Linear)]
    if len(layers) < blocks:
        raise BackboneError(f"{backbone.arch} has no qkv layer in each of its {blocks} blocks: use a plain ViT")
    for name in layers:
        layer = backbone.get_submodule(name)
        width = layer.out_features // 3
        divisor = round(2 / share) if share else 0
        backbone.set_submodule(name, nn.Sequential(layer, SpaceTimeMixing(frames, width, divisor)))
