"""GSF and XViT on clips whose frames are the same forwards and backwards: a square of one photo slides over another.

A small CNN that averages frames, the same CNN with GSF, and a small ViT with XViT learn two things of each clip: which
way the square goes, and which of five photos it is from. They are tested on pieces of the photos that no training clip
shows. The averages of GSF and XViT, alike and with weights found on other training pieces, stand beside them.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from foveal.core.seeds import derive, seed_everything
from foveal.data.clips import Clips, MemoryClip
from foveal.data.photos import photos
from foveal.data.worlds import arrow_of_motion
from foveal.evaluate.calibration import to_probabilities
from foveal.evaluate.fusion import fuse, search_weights
from foveal.features.clips import judge_clips
from foveal.methods.video.gsf_xvit import GsfXvit, Options
from foveal.train.clips import LabelledClips
from foveal.train.loop import train
from foveal.train.small import small_net

SIZE, FRAMES, HEIGHT = 32, 8, 192
TRAIN, HELD_OUT, TEST = (0.0, 0.5), (0.5, 0.7), (0.7, 1.0)
"""Bands of the photos."""


def world(shown: list[np.ndarray], count: int, seed: int, band: tuple[float, float]) -> Clips:
    pixels, labels = arrow_of_motion(shown, count, SIZE, FRAMES, seed, band)
    classes = tuple(f"{way}+{photo}" for way in ("right", "left") for photo in range(len(shown)))
    return Clips(
        name="arrow of motion",
        ids=[f"{band}/{index}" for index in range(count)],
        clips=[MemoryClip(clip) for clip in pixels],
        counts=np.full(count, FRAMES),
        digests=[f"{seed} {band} {index}" for index in range(count)],
        labels=labels[:, 0] * len(shown) + labels[:, 1],
        classes=classes,
    )


def backbone(mixer: str, seed: int) -> Any:
    if mixer != "xvit":
        return small_net(
            "resnet18", seed, size=SIZE, layers=(1, 1, 1, 1), channels=(16, 32, 64, 64), stem_type="deep", stem_width=8,
            zero_init_last=False,
        )  # fmt: skip
    net = small_net(
        "vit_tiny_patch16_224", seed, size=SIZE, img_size=SIZE, patch_size=8, embed_dim=64, depth=2, num_heads=2,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    nn.init.normal_(net.model.pos_embed, std=0.5)  # without pretraining, places as small as timm's are learnt too late
    return net


def learnt(mixer: str, clips: Clips, others: list[Clips], seed: int, epochs: int) -> list[np.ndarray]:
    """Probabilities of other clips by a net taught on `clips`."""
    method = GsfXvit(
        Options(
            mixer=mixer,
            frames=FRAMES,
            share=0.5,
            dropout=0.0,
            separator="+",
            epochs=epochs,
            lr=1e-3,
            batch_size=16,
            augment="none",
        )
    )
    net = backbone(mixer, seed)
    seed_everything(derive(seed, mixer))
    model = method.attach(net, clips.classes)
    feed = LabelledClips(clips, np.arange(len(clips)), method, net.preprocessing, torch.ones(len(clips.classes)))
    with tempfile.TemporaryDirectory() as work:
        model = train(method, model, feed, seed, recipe=method.recipe(), device="cpu", work=Path(work)).model
    judged = [judge_clips(method, model, each.clips, net.preprocessing, device="cpu") for each in others]
    return [to_probabilities(each.logits.numpy(), "single-label") for each in judged]


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    shown = [
        np.asarray(
            photo.resize([round(side * HEIGHT / min(photo.size)) for side in photo.size], Image.Resampling.BICUBIC)
        )
        for photo in photos().values()
    ]
    drawn = derive(seed, "gsf-xvit clips")
    clips, held_out, test = (
        world(shown, count, drawn, band)
        for count, band in ((40 if tiny else 1200, TRAIN), (20 if tiny else 200, HELD_OUT), (20 if tiny else 400, TEST))
    )
    epochs = {"none": 2, "gsf": 6, "xvit": 20}
    held: dict[str, np.ndarray] = {}
    tested: dict[str, np.ndarray] = {}
    for mixer, count in epochs.items():
        held[mixer], tested[mixer] = learnt(mixer, clips, [held_out, test], seed, 1 if tiny else count)
    members = ("gsf", "xvit")
    weights = search_weights([held[name] for name in members], held_out.labels)
    tested["ensemble"] = fuse([tested[name] for name in members], classes=[clips.classes] * len(members))
    tested["weighted"] = fuse([tested[name] for name in members], weights.tolist())
    values: dict[str, float] = {"weighted.gsf_weight": float(weights[0])}
    way = test.labels // len(shown)
    for name, p in tested.items():
        right = p.reshape(len(p), 2, -1).sum(2).argmax(1) == way
        values[f"{name}.direction"] = float(right.mean())
        values[f"{name}.action"] = float((p.argmax(1) == test.labels).mean())
    for name in members:
        values[f"{name}.above_75"] = float(values[f"{name}.direction"] > 0.75)
    best = max(values[f"{name}.action"] for name in members)
    for name in ("ensemble", "weighted"):
        values[f"{name}.at_least_best"] = float(values[f"{name}.action"] >= best)
    return values
