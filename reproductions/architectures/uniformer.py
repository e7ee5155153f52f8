"""UniFormer in small: local then global relations against one kind alone, and clips against averaged frames.

On solar cells, whole or defective, at 64 pixels, nets of a quarter of the small variant's widths learn from 300 images
of each class. On clips of a digit that moves left or right by two pixels a frame, a net with space-time blocks and an
image net whose answers are averaged over the frames learn from the same clips for the same epochs.
"""

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.architectures.uniformer import create_video_model
from foveal.core.seeds import derive, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

SMALL = {"dims": (16, 32, 80, 128), "head_dim": 16, "depths": (1, 1, 2, 1)}


class FrameAverage(nn.Module):
    """Clips [B, 3, T, H, W] -> the mean of an image net's logits over the frames."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2)
        return self.net(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(1)


def moving_digits(digits: Dataset, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips [count, 3, 4, 32, 32] of digits that wrap around, and whether each moves right [count]."""
    rng = np.random.default_rng(seed)
    clips, labels = np.zeros((count, 4, 32, 32), np.float32), rng.integers(0, 2, count)
    for clip, label, row in zip(clips, labels, rng.permutation(len(digits))[:count], strict=True):
        picture = np.asarray(digits.image(int(row)).convert("L"), np.float32) / 255
        start = rng.integers(0, 32)
        for frame in range(4):
            clip[frame] = np.roll(picture, start + (2 if label else -2) * frame, axis=1)
    return torch.from_numpy(clips)[:, None].expand(-1, 3, -1, -1, -1) - 0.5, torch.from_numpy(labels)


def clip_accuracy(net: nn.Module, clips: Tensor, labels: Tensor, train: int, epochs: int, seed: int) -> float:
    """Accuracy on the clips after the first `train`, which the net learns from."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        net.train()
        for rows in torch.randperm(train, generator=order).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(clips[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.inference_mode():
        answers = torch.cat([net.eval()(part) for part in clips[train:].split(64)]).argmax(1)
    return float((answers == labels[train:]).float().mean())


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    mixers = {"mixed": ("local", "local", "global", "global"), "local": ("local",) * 4, "global": ("global",) * 4}
    nets = {name: small_net("uniformer_small", seed, size=64, mixers=kinds, **SMALL) for name, kinds in mixers.items()}
    method = Full(Options(epochs=1 if tiny else 12, lr=1e-3, head_lr_multiplier=1.0))
    elpv = open_dataset("sample:elpv")
    values = race(nets, method, elpv, seed, train=8 if tiny else 300, test=20 if tiny else 600)

    train, test = (32, 32) if tiny else (512, 256)
    clips, labels = moving_digits(open_dataset("sample:digits"), train + test, seed)
    for name in ("clip", "frames"):
        seed_everything(derive(seed, "uniformer-clips"))
        if name == "clip":
            net: nn.Module = create_video_model("uniformer_video_small", num_classes=2, **SMALL)
        else:
            net = FrameAverage(timm.create_model("uniformer_small", num_classes=2, **SMALL))
        values[f"{name}.accuracy"] = clip_accuracy(net, clips, labels, train, 1 if tiny else 8, seed)
    return values
