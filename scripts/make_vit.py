"""Teach vit_hybrid_foveal what EfficientNet-Lite0 sees, and write a file that `--backbone` takes.

    python scripts/make_vit.py [--views 36000] [--work runs/vit] [--out runs/vit_hybrid_foveal.safetensors]

Pictures: the photos that scikit-image and scikit-learn ship, 100 of sample:textile, and procedural ones. Every view is
a new crop at a random scale and angle, often mixed with another or of low resolution, and always shifted in colour.
Loss, on the views of a batch:

    |D z - f|^2 / var(f)  +  |D' z_i - f_i|^2 / 2 var(f_i)  +  KL(softmax(teacher), softmax(student)) / 2
      +  |C(z) - C(f)|^2 / var(C(f))

f: the teacher's pooled features [1280]; f_i: the same at position i of its last map; z, z_i: the student's class and
patch tokens; D, D': linear maps, thrown away at the end; C: cosines of all pairs of views, so that neighbours stay
neighbours. Stopped or killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, imagenet_classifier, load_backbone
from foveal.core.folders import atomic_file
from foveal.core.method import Adapt, Classifier, Recipe, Spec, method
from foveal.core.seeds import generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset
from foveal.data.worlds import KINDS, grid, noise
from foveal.train.classify import train_classifier

SIDE = 256
PROCEDURAL, TEXTILES = 800, 100
SHARES = (0.55, 0.1, 0.35)
"""Of crops from photos, textiles and procedural pictures."""


def photos() -> list[Image.Image]:
    """All colour and grey photos inside scikit-image and scikit-learn."""
    import skimage
    import sklearn.datasets

    drawn = {"chessboard_GRAY", "chessboard_RGB", "horse", "logo", "phantom", "microaneurysms"}
    files = sorted(
        file for kind in ("png", "jpg") for file in (Path(skimage.__file__).parent / "data").glob(f"*.{kind}")
    )
    found = [Image.open(file).convert("RGB") for file in files if file.stem not in drawn]
    return found + [Image.fromarray(picture) for picture in sklearn.datasets.load_sample_images().images]


def textiles() -> list[Image.Image]:
    textile = open_dataset("sample:textile")
    chosen = generator(0, "textile").permutation(len(textile))[:TEXTILES]
    return [textile.image(int(row)).resize((SIDE, SIDE)) for row in chosen]


def dead_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Discs and boxes of all sizes that hide one another (Lee, Mumford and Huang 2001) under a coloured noise,
    [size, size, 3] in 0..1."""
    image = Image.new("RGB", (2 * size, 2 * size), tint(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(40, 400))):
        radius, stretch = size * (rng.uniform(0.02, 1) ** 3 + 0.02), rng.uniform(0.6, 1.6)
        corners, start = int(rng.choice([3, 4, 4, 5, 6, 40])), rng.uniform(0, 2 * np.pi)
        turn = start + 2 * np.pi * np.arange(corners) / corners
        points = rng.uniform(0, 2 * size, 2) + radius * np.stack([np.cos(turn) * stretch, np.sin(turn) / stretch], 1)
        draw.polygon([(x, y) for x, y in points], fill=tint(rng))
    flat = np.asarray(image.resize((size, size), Image.Resampling.BOX)) / 255
    return flat * (1 + rng.uniform(0, 0.8) * (noise(size, rng) - 0.5))


def strokes(size: int, rng: np.random.Generator) -> np.ndarray:
    """A few bent lines of one width on plain ground, [size, size, 3] in 0..1."""
    image = Image.new("RGB", (2 * size, 2 * size), tint(rng))
    draw, width = ImageDraw.Draw(image), int(size * rng.uniform(0.02, 0.4))
    for _ in range(int(rng.integers(1, 7))):
        bends = rng.uniform(0.1, 1.9, (4, 2)) * size
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 3 * bends[0] + 3 * t * (1 - t) ** 2 * bends[1] + 3 * t**2 * (1 - t) * bends[2]
        points = [(x, y) for x, y in curve + t**3 * bends[3]]
        draw.line(points, fill=tint(rng), width=width, joint="curve")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) / 255


def tint(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def julia(size: int, rng: np.random.Generator) -> np.ndarray:
    """Escape times of z -> z^2 + c in colours at random, [size, size, 3] in 0..1."""
    angle = rng.uniform(0, 2 * np.pi)
    c = 0.7885 * np.exp(1j * angle) * rng.uniform(0.9, 1.05)
    y, x = grid(size)
    z, steps = (x + 1j * y) * rng.uniform(0.8, 3.2), np.zeros((size, size))
    for _ in range(60):
        alive = np.abs(z) < 4
        z = np.where(alive, z**2 + c, z)
        steps += alive
    phase, speed = rng.uniform(0, 6.28, 3), rng.uniform(0.05, 0.4, 3)
    return 0.5 + 0.5 * np.sin(steps[..., None] * speed + phase)


def procedural(index: int) -> Image.Image:
    rng = generator(0, "procedural", index)
    kind = [dead_leaves, strokes, julia, KINDS[index // 8 % len(KINDS)]][index % 4]
    return Image.fromarray(np.rint(np.clip(kind(SIDE, rng), 0, 1) * 255).astype(np.uint8))


class Views:
    """View i of some banks of pictures, as the bytes of an image file."""

    def __init__(self, banks: list[list[Image.Image]]) -> None:
        self.banks = banks

    def read(self, index: int) -> bytes:
        rng = generator(0, "view", index)
        view = self.crop(rng)
        if rng.random() < 0.5:
            view = mixed(view, self.crop(rng), rng)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(rng.uniform(0.4, 1.6))
        if rng.random() < 0.3:
            view = Image.merge("RGB", [view.split()[channel] for channel in rng.permutation(3)])
        if rng.random() < 0.2:
            view = view.convert("L").convert("RGB")
        if rng.random() < 0.2:
            view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3)))
        if rng.random() < 0.3:
            view = coarse(view, rng)
        file = io.BytesIO()
        view.save(file, "BMP")
        return file.getvalue()

    def crop(self, rng: np.random.Generator) -> Image.Image:
        """A part of a picture at any scale, turned by any angle a third of the time."""
        bank = self.banks[int(rng.choice(len(self.banks), p=SHARES))]
        picture = bank[int(rng.integers(len(bank)))]
        area = np.exp(rng.uniform(np.log(0.02), 0))
        ratio = np.exp(rng.uniform(-0.4, 0.4))
        width = min(picture.width, np.sqrt(area * picture.width * picture.height * ratio))
        height = min(picture.height, np.sqrt(area * picture.width * picture.height / ratio))
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        view = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.33:
            turned = view.resize((SIDE * 3 // 2,) * 2).rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
            edge = SIDE // 4
            view = turned.crop((edge, edge, edge + SIDE, edge + SIDE))
        return view


def mixed(view: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two views faded into one another, or one pasted onto the other as a box or a disc."""
    if rng.random() < 0.5:
        return Image.blend(view, other, rng.uniform(0.1, 0.9))
    y, x = grid(SIDE)
    cy, cx = rng.uniform(-0.4, 0.4, 2)
    radius = rng.uniform(0.1, 0.4)
    reach = np.hypot(y - cy, x - cx) if rng.random() < 0.5 else np.maximum(abs(y - cy), abs(x - cx))
    return Image.composite(other, view, Image.fromarray((255 * (reach < radius)).astype(np.uint8)))


def coarse(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A view as if it had been taken with 8 to 96 pixels."""
    side = round(np.exp(rng.uniform(np.log(8), np.log(96))))
    ways = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    return view.resize((side, side), Image.Resampling.BOX).resize((SIDE, SIDE), ways[int(rng.integers(3))])


class Pupil(Classifier):
    """The student with the teacher's last layers, which share its convolutions."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, nn.Linear(192, 1000))
        teacher = imagenet_classifier(offline=True)
        net = teacher.backbone.model
        self.to_features = nn.Sequential(net.conv_head, net.bn2).requires_grad_(False)
        self.teacher_head = teacher.head.requires_grad_(False)
        self.decode, self.decode_patches = nn.Linear(192, 1280), nn.Linear(192, 1280)
        backbone.model.patch_embed.backbone.load_state_dict(
            {name: net.state_dict()[name] for name in backbone.model.patch_embed.backbone.state_dict()}
        )
        backbone.model.patch_embed.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Pupil:
        super().train(mode)
        self.backbone.model.patch_embed.backbone.eval()
        self.to_features.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        vit = self.backbone.model
        with torch.no_grad():
            trunk = vit.patch_embed.backbone(images)[-1]
            local = self.to_features(trunk).flatten(2).transpose(1, 2)
            features = local.mean(1)
            logits = self.teacher_head(features)
        tokens = vit._pos_embed(vit.patch_embed.proj(trunk).flatten(2).transpose(1, 2))
        tokens = vit.norm(vit.blocks(vit.norm_pre(tokens)))
        z = tokens[:, 0]
        return {
            "features": unexplained(self.decode(z), features),
            "neighbours": unexplained(cosines(z), cosines(features)),
            "patches": unexplained(self.decode_patches(tokens[:, 1:]).flatten(0, 1), local.flatten(0, 1)),
            "logits": F.kl_div(
                self.head(z).float().log_softmax(1),
                logits.float().log_softmax(1),
                reduction="batchmean",
                log_target=True,
            ),
        }


def cosines(x: Tensor) -> Tensor:
    """Of all pairs of different rows of [n, D], [n (n - 1), 1]."""
    x = F.normalize(x.float(), dim=1)
    return (x @ x.T)[~torch.eye(len(x), dtype=torch.bool, device=x.device)][:, None]


def unexplained(guess: Tensor, truth: Tensor) -> Tensor:
    """Share of the variance of truth [n, D] that the guess leaves."""
    guess, truth = guess.float(), truth.float()
    return (guess - truth).square().sum() / (truth - truth.mean(0)).square().sum().clamp_min(1e-6)


@method(Spec("scripts", "Taught by EfficientNet-Lite0", 2026, None))
class Taught(Adapt):
    def attach(self, backbone: Any, classes: int) -> Classifier:
        return Pupil(backbone)

    def recipe(self) -> Recipe:
        return Recipe(epochs=1, batch_size=96, lr=1.5e-3, weight_decay=0.02, warmup=0.05, augment="light")

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = model(batch["images"])
        whole = parts["features"] + 0.5 * parts["patches"] + 0.5 * parts["logits"] + parts["neighbours"]
        return {"loss": whole, **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=36_000)
    parser.add_argument("--work", type=Path, default=Path("runs/vit"))
    parser.add_argument("--out", type=Path, default=Path("runs/vit_hybrid_foveal.safetensors"))
    given = parser.parse_args()
    start = time.perf_counter()
    banks = [photos(), textiles(), [procedural(index) for index in range(PROCEDURAL)]]
    seed_everything(0)
    backbone = load_backbone("vit_hybrid_foveal", pretrained=False)
    taught = Taught()
    pupil = taught.attach(backbone, 1)
    views = Dataset(
        "views", [f"{index:07d}" for index in range(given.views)], np.zeros(given.views, np.int64), ("view",),
        "single-label", None, Views(banks),
    )  # fmt: skip

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] % 20 == 0:
            told = (event["step"], event["steps"], event["loss"], event["examples_per_second"])
            print("step {} of {}: loss {:.4f}, {:.0f} views a second".format(*told), file=sys.stderr, flush=True)

    rows = np.arange(given.views)
    done = train_classifier(
        taught, pupil, views, backbone.preprocessing, views.labels, rows, rows[:0], torch.ones(1), 0,
        recipe=taught.recipe(), device="auto", work=given.work, on_event=tell,
    )  # fmt: skip
    model = done.model
    tensors = {
        name: value.half() for name, value in model.backbone.model.state_dict().items() if value.is_floating_point()
    }
    tensors |= {n: v for n, v in model.backbone.model.state_dict().items() if not v.is_floating_point()}
    tensors |= {f"head.{name}": value.half() for name, value in model.head.state_dict().items()}
    about = {"architecture": "vit_hybrid_foveal", "views": str(given.views), "photos": str(len(banks[0])),
        "textiles": str(TEXTILES),
             "procedural": str(PROCEDURAL), "teacher": "tf_efficientnet_lite0"}  # fmt: skip
    with atomic_file(given.out) as staging:
        save_file({name: value.contiguous() for name, value in tensors.items()}, staging, about)
    minutes = round((time.perf_counter() - start) / 60, 1)
    print(
        json.dumps(
            {"weights": str(given.out), "bytes": given.out.stat().st_size, "views": given.views, "minutes": minutes}
        )
    )


if __name__ == "__main__":
    main()
