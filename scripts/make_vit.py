"""Teach vit_hybrid_foveal what EfficientNet-Lite0 sees, and write a file that `--backbone` takes.

    python scripts/make_vit.py [--views 12000] [--work runs/vit] [--out runs/vit_hybrid_foveal.safetensors]

Pictures: the photos that scikit-image and scikit-learn ship, 100 of sample:textile, and procedural ones. Every view is
a new crop at a random scale and angle, often mixed with another or of low resolution, and always shifted in colour.
The trunk, Lite0's own convolutions, stays as it is and sees each view once.
Start: the patch embedding is the principal axes of the trunk's maps over the first views, the first block's values pass
through it unchanged (so that the class token begins as the mean of what the trunk sees), and D, D' and the head are
ridge regressions on what the tokens say then. Loss, on the views of a batch:

    |D z - f|^2 / var(f)  +  |D' z_i - f_i|^2 / 2 var(f_i)  +  KL(softmax(teacher), softmax(student)) / 2
      +  |C(z) - C(f)|^2 / var(C(f))

f: the teacher's pooled features [1280]; f_i: the same at position i of its last map; z, z_i: the student's class and
patch tokens; D, D': linear maps, thrown away at the end; C: cosines of all pairs of views, so that neighbours stay
neighbours. Stopped or killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, imagenet_classifier, load_backbone, normalise
from foveal.core.folders import atomic_file
from foveal.core.method import Recipe, Spec, Trained, method
from foveal.core.seeds import generator, seed_everything
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.data.worlds import KINDS, grid, noise
from foveal.train.batches import ahead, stacked
from foveal.train.feed import Feed
from foveal.train.loop import train

SIDE = 256
PROCEDURAL, TEXTILES = 800, 100
BATCH = 96
STARTING = 1920
"""Views that the start is computed from."""
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
    """View i of some banks of pictures."""

    def __init__(self, banks: list[list[Image.Image]]) -> None:
        self.banks = banks

    def view(self, index: int) -> Image.Image:
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
        return coarse(view, rng) if rng.random() < 0.3 else view

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


class Maps(Feed):
    """Maps [b, 320, 7, 7] that the frozen trunk makes of the views: it sees each view once, in any number of epochs."""

    def __init__(self, views: Views, count: int, backbone: Backbone, file: Path) -> None:
        shape, done = (count, 320, 7, 7), file.with_suffix(".done")
        kept = int(done.read_text()) if done.is_file() else 0
        self.maps = np.lib.format.open_memmap(file, "r+" if kept else "w+", np.float16, shape)
        if self.maps.shape != shape:
            raise SystemExit(f"{file} holds {len(self.maps)} views, expected {count}: name another --work")
        trunk, preprocessing = backbone.model.patch_embed.backbone.eval(), backbone.preprocessing
        ends = [*range(kept, count, BATCH)[1:], count]

        def pixels(index: int) -> np.ndarray:
            return to_pixels(views.view(index), preprocessing)

        with ThreadPoolExecutor(2) as pool, torch.inference_mode():
            drawn = ahead(pixels, range(kept, count), pool, 2 * BATCH)
            for start, end, images in zip([kept, *ends], ends, stacked(drawn, np.diff([kept, *ends])), strict=False):
                self.maps[start:end] = trunk(normalise(torch.from_numpy(images), preprocessing))[-1].numpy()
                self.maps.flush()
                with atomic_file(done) as staging:
                    staging.write_text(str(end))
                print(f"{end} of {count} views", file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self.maps)

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"maps": self.maps[index]}

    def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"maps": batch["maps"].float()}

    def fingerprint(self) -> str:
        return f"{len(self)} views, {float(self.maps[-1].astype(np.float64).sum())!r}"


class Pupil(nn.Module):
    """The student behind its trunk, with what it has to say, and the teacher's last layers, which share its trunk."""

    def __init__(self, vit: Any, teacher: Any) -> None:
        super().__init__()
        net = teacher.backbone.model
        self.to_features = nn.Sequential(net.conv_head, net.bn2).requires_grad_(False)
        self.teacher_head = teacher.head.requires_grad_(False)
        self.embed, self.blocks, self.norm = vit.patch_embed.proj, vit.blocks, vit.norm
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.decode, self.decode_patches = nn.Linear(vit.embed_dim, 1280), nn.Linear(vit.embed_dim, 1280)
        self.head = nn.Linear(vit.embed_dim, 1000)

    @torch.no_grad()
    def start(self, maps: Tensor) -> None:
        """From the principal axes of maps [n, 320, h, w], see the head of this file."""
        width = self.pos_embed.shape[2]
        axes = torch.linalg.svd(maps.mean((2, 3)), full_matrices=False).Vh[: width - 1]
        level = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, width - 1)], 1)).Q[:, 1:]
        self.embed.weight.copy_((level @ axes)[:, :, None, None])  # tokens of mean 0 keep their angles in layer norms
        self.embed.bias.zero_()
        first = self.blocks[0].attn
        first.qkv.weight[2 * width :] = first.proj.weight.copy_(torch.eye(width))
        tokens = torch.cat([self.read(some) for some in maps.split(BATCH)])
        local = torch.cat([self.taught(some) for some in maps.split(BATCH)])
        regress(self.decode, tokens[:, 0], local.mean(1))
        regress(self.decode_patches, tokens[:, 1::5].flatten(0, 1), local[:, ::5].flatten(0, 1))
        self.head.weight.copy_(self.teacher_head.weight @ self.decode.weight)
        self.head.bias.copy_(self.teacher_head(self.decode.bias))

    def taught(self, maps: Tensor) -> Tensor:
        """The teacher's last map at each position, [n, h w, 1280]."""
        return self.to_features(maps).flatten(2).transpose(1, 2)

    def read(self, maps: Tensor) -> Tensor:
        """The student's tokens [n, 1 + h w, width]."""
        tokens = self.embed(maps).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed
        return self.norm(self.blocks(tokens))

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        self.to_features.eval()
        local = self.taught(maps)
        features = local.mean(1)
        tokens = self.read(maps)
        z = tokens[:, 0]
        return {
            "features": unexplained(self.decode(z), features),
            "neighbours": unexplained(cosines(z), cosines(features)),
            "patches": unexplained(self.decode_patches(tokens[:, 1:]).flatten(0, 1), local.flatten(0, 1)),
            "logits": F.kl_div(
                self.head(z).float().log_softmax(1),
                self.teacher_head(features).float().log_softmax(1),
                reduction="batchmean",
                log_target=True,
            ),
        }


def regress(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Ridge regression of y [n, E] on x [n, D]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    gram = x.T @ x
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    layer.weight.copy_(torch.linalg.solve(gram + ridge, x.T @ (y - y_mean)).T)
    layer.bias.copy_(y_mean - layer.weight @ x_mean)


def cosines(x: Tensor) -> Tensor:
    """Of all pairs of different rows of [n, D], [n (n - 1), 1]."""
    x = F.normalize(x.float(), dim=1)
    return (x @ x.T)[~torch.eye(len(x), dtype=torch.bool, device=x.device)][:, None]


def unexplained(guess: Tensor, truth: Tensor) -> Tensor:
    """Share of the variance of truth [n, D] that the guess leaves."""
    guess, truth = guess.float(), truth.float()
    return (guess - truth).square().sum() / (truth - truth.mean(0)).square().sum().clamp_min(1e-6)


@method(Spec("scripts", "Taught by EfficientNet-Lite0", 2026, None))
class Taught(Trained):
    def recipe(self) -> Recipe:
        return Recipe(epochs=3, batch_size=BATCH, lr=3e-4, weight_decay=0.02, warmup=0.05)

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = model(batch["maps"])
        whole = parts["features"] + 0.5 * parts["patches"] + 0.5 * parts["logits"] + parts["neighbours"]
        return {"loss": whole, **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=12_000)
    parser.add_argument("--work", type=Path, default=Path("runs/vit"))
    parser.add_argument("--out", type=Path, default=Path("runs/vit_hybrid_foveal.safetensors"))
    given = parser.parse_args()
    start = time.perf_counter()
    given.work.mkdir(parents=True, exist_ok=True)
    banks = [photos(), textiles(), [procedural(index) for index in range(PROCEDURAL)]]
    seed_everything(0)
    backbone, teacher = load_backbone("vit_hybrid_foveal", pretrained=False), imagenet_classifier(offline=True)
    vit, convolutions = backbone.model, teacher.backbone.model.state_dict()
    trunk = vit.patch_embed.backbone
    trunk.load_state_dict({name: convolutions[name] for name in trunk.state_dict()})
    maps = Maps(Views(banks), given.views, backbone, given.work / "maps.npy")
    pupil = Pupil(vit, teacher)
    pupil.start(torch.from_numpy(maps.maps[:STARTING]).float())

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] % 20 == 0:
            told = (event["step"], event["steps"], event["loss"], event["examples_per_second"])
            print("step {} of {}: loss {:.4f}, {:.0f} views a second".format(*told), file=sys.stderr, flush=True)

    taught = Taught()
    train(taught, pupil, maps, 0, recipe=taught.recipe(), work=given.work, on_event=tell)
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("head.")}
    tensors |= {f"head.{name}": tensor for name, tensor in pupil.head.state_dict().items()}
    about = {
        "architecture": "vit_hybrid_foveal", "teacher": "tf_efficientnet_lite0", "views": str(given.views),
        "photos": str(len(banks[0])), "textiles": str(TEXTILES), "procedural": str(PROCEDURAL),
    }  # fmt: skip
    with atomic_file(given.out) as staging:
        halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
        save_file({name: tensor.contiguous() for name, tensor in halves.items()}, staging, about)
    minutes = round((time.perf_counter() - start) / 60, 1)
    told = {"weights": str(given.out), "bytes": given.out.stat().st_size, "views": given.views, "minutes": minutes}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
