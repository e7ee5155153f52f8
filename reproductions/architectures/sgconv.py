"""SGConv in small: digits as signals of 1,024 values, the rows of 32 x 32 pixels one after another.

Two residual layers of width 48: long kernels that decay, the same without decay, and a plain convolution of 7 values
with as many weights; 40 images of each class, the same steps.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.architectures.sgconv import SGConv, SGConvNet
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.open import open_dataset
from foveal.train.events import balanced_accuracy
from foveal.train.small import few_and_rest

LENGTH, WIDTH = 1024, 48


class LocalConv(nn.Module):
    """Sequences [B, L, d] -> [B, L, d]: a dense convolution of 7 values, then what `SGConv` has behind its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 7, padding=3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


def score(mixer, signals: Tensor, labels: Tensor, train: int, epochs: int, seed: int) -> dict[str, float]:
    """Balanced accuracy on all but the first `train` signals, of a model taught on those."""
    seed_everything(derive(seed, "init"))
    model = SGConvNet(1, 10, LENGTH, WIDTH, 2, mixer=mixer)
    kernels = [p for name, p in model.named_parameters() if name.endswith("conv.kernel")]
    others = [p for name, p in model.named_parameters() if not name.endswith("conv.kernel")]
    groups = [{"params": kernels, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.01}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=3e-3)
    batches = -(-train // 20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    order = generator(seed, "order")
    for _ in range(epochs):
        for rows in np.array_split(order.permutation(train), batches):
            optimizer.zero_grad()
            F.cross_entropy(model(signals[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        logits = torch.cat([model.eval()(part) for part in signals[train:].split(50)])
    parameters = sum(p.numel() for p in model.parameters())
    return {"balanced_accuracy": balanced_accuracy(logits, labels[train:]), "params": parameters}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    digits = open_dataset("sample:digits")
    train_rows, rest = few_and_rest(digits.labels, 2 if tiny else 40, seed)
    test_rows = np.sort(generator(seed, "test").permutation(rest)[: 20 if tiny else 400])
    rows = np.concatenate([train_rows, test_rows])
    pixels = np.stack([np.asarray(digits.image(int(row)).convert("L"), np.float32) for row in rows])
    signals = torch.from_numpy(pixels.reshape(len(rows), LENGTH, 1) / 127.5 - 1)
    labels = torch.from_numpy(digits.labels[rows])
    mixers = {
        "sgconv": lambda: SGConv(WIDTH, LENGTH),
        "no_decay": lambda: SGConv(WIDTH, LENGTH, decay=(1.0, 1.0)),
        "local": lambda: LocalConv(WIDTH),
    }
    values: dict[str, float] = {}
    for name, mixer in mixers.items():
        found = score(mixer, signals, labels, len(train_rows), 1 if tiny else 15, seed)
        values.update({f"{name}.{key}": value for key, value in found.items()})
    return values
