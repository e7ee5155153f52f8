"""Attention against average pooling on one frozen map, and where a small PatchConvNet looks.

The last map of EfficientNet-Lite0 (7 x 7 x 1280) for woven fabric of three kinds, 60 images of each to learn from: an
`AggregationPool` and a linear layer, against the average and a linear layer, trained alike (layer scales start at 0.1,
since a run is short). Then a PatchConvNet of width 64 and 8 blocks, from nothing, on solar cells at 128 pixels: of the
test cells that are defective and found so, the share whose attention lies more on the darkest quarter of the patches
than an even spread would (0.25).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.architectures.patchconvnet import AggregationPool, attention_maps
from foveal.backbones.adapter import load_backbone, normalise
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.dataset import Dataset
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.events import balanced_accuracy
from foveal.train.small import few_and_rest, measure, shrunk, small_net


def last_maps(dataset: Dataset, rows: np.ndarray) -> Tensor:
    """Maps [n, 1280, 7, 7] of the default backbone."""
    backbone = load_backbone("tf_efficientnet_lite0", offline=True).eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            pixels = [to_pixels(dataset.image(int(row)), backbone.preprocessing) for row in rows[start : start + 32]]
            batch = normalise(torch.from_numpy(np.stack(pixels)), backbone.preprocessing)
            found.append(backbone.model.forward_features(batch))
    return torch.cat(found).clone()


def pooled(pool: nn.Module, maps: Tensor, labels: Tensor, train: int, epochs: int, seed: int) -> float:
    """Balanced accuracy on all but the first `train` maps, of a pooling and a linear layer taught on those."""
    seed_everything(derive(seed, "pool"))
    model = nn.Sequential(pool, nn.LayerNorm(1280), nn.Linear(1280, int(labels.max()) + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    batches = epochs * -(-train // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=batches)
    order = generator(seed, "order")
    for _ in range(epochs):
        for rows in np.array_split(order.permutation(train), -(-train // 32)):
            optimizer.zero_grad()
            F.cross_entropy(model(maps[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        logits = torch.cat([model.eval()(part) for part in maps[train:].split(64)])
    return balanced_accuracy(logits, labels[train:])


def on_dark_parts(seed: int, tiny: bool) -> float:
    cells = open_dataset("sample:elpv")
    chosen, _ = few_and_rest(cells.labels, 12 if tiny else 600, seed)
    small = shrunk(cells, chosen, 128)
    train_rows, test_rows = few_and_rest(small.labels, 8 if tiny else 350, seed)
    net = small_net("patchconvnet_s60", seed, size=128, embed_dim=64, depth=8, init_values=0.1)
    method = Full(Options(epochs=1 if tiny else 15, lr=2e-3, head_lr_multiplier=1.0))
    model = measure(method, net, small, train_rows, np.sort(test_rows), seed).model.eval()
    defective = test_rows[small.labels[test_rows] == small.classes.index("defective")]
    pixels = np.stack([to_pixels(small.image(int(row)), net.preprocessing) for row in defective])
    images = normalise(torch.from_numpy(pixels), net.preprocessing)
    with torch.inference_mode():
        found = model(images).argmax(1) == small.classes.index("defective")
        inner: nn.Module = model.backbone.model  # type: ignore[assignment]
        maps = attention_maps(inner, images).flatten(1)
    if not found.any():
        return 0.0
    dark = F.avg_pool2d(images.mean(1, keepdim=True), 16).flatten(1).argsort(1)[:, :16]
    mass = (maps / maps.sum(1, keepdim=True)).gather(1, dark).sum(1)
    return float((mass[found] > 0.25).float().mean())


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    textile = open_dataset("sample:textile")
    train_rows, rest = few_and_rest(textile.labels, 4 if tiny else 60, seed)
    test_rows = np.sort(generator(seed, "test").permutation(rest)[: 8 if tiny else 420])
    maps = last_maps(textile, np.concatenate([train_rows, test_rows]))
    labels = torch.from_numpy(textile.labels[np.concatenate([train_rows, test_rows])])
    epochs = 1 if tiny else 12
    seed_everything(derive(seed, "init"))
    attention = AggregationPool(1280, init_values=0.1)
    average = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {
        "attention.balanced_accuracy": pooled(attention, maps, labels, len(train_rows), epochs, seed),
        "average.balanced_accuracy": pooled(average, maps, labels, len(train_rows), epochs, seed),
        "maps.on_dark_parts": on_dark_parts(seed, tiny),
    }
