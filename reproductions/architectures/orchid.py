"""Orchid in small: recall of what followed a key, and digits as 64 tokens.

Recall: 32 keys and their values (20 symbols each kind) in turn, then one of the keys; the network names its value.
Two blocks of width 64; the filter made from the input (type II) against fixed kernels alone, same data, same steps.
Digits: four blocks of width 64 on patches of 4 pixels, Orchid (type I) against attention, 60 images of each class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.architectures.orchid import Adaptive, Orchid
from foveal.core.seeds import derive, seed_everything
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import race, small_net

KINDS, PAIRS = 20, 32


class Recall(nn.Module):
    """Symbols [B, L] -> logits of the value [B, KINDS], read at the last place."""

    def __init__(self, adaptive: Adaptive, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * KINDS, width)
        self.mixers = nn.ModuleList(Orchid(width, 2 * PAIRS + 1, adaptive) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, KINDS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embed(symbols)
        for index, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(x[:, -1])


def pairs(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [count, 2 PAIRS + 1] of keys and values in turn and a key that was seen; its value [count]."""
    book = torch.randint(KINDS, (count, KINDS), generator=random)
    keys = torch.randint(KINDS, (count, PAIRS), generator=random)
    values = book.gather(1, keys)
    asked = keys.gather(1, torch.randint(PAIRS, (count, 1), generator=random))
    sequence = torch.stack([keys, values + KINDS], 2).flatten(1)
    return torch.cat([sequence, asked], 1), book.gather(1, asked)[:, 0]


def recall(adaptive: Adaptive, seed: int, tiny: bool) -> float:
    """Share of right values among 500 unseen sequences."""
    seed_everything(derive(seed, "recall"))
    model = Recall(adaptive)
    random = torch.Generator().manual_seed(derive(seed, "pairs"))
    steps = 3 if tiny else 800
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        sequence, value = pairs(32, random)
        optimizer.zero_grad()
        F.cross_entropy(model(sequence), value).backward()
        optimizer.step()
        schedule.step()
    sequence, value = pairs(50 if tiny else 500, random)
    with torch.inference_mode():
        return float((model.eval()(sequence).argmax(1) == value).float().mean())


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
    nets = {
        "orchid": small_net("orchid_vit_tiny_patch4_32", seed, size=32, **shape),
        "attention": small_net("vit_tiny_patch16_224", seed, size=32, class_token=False, global_pool="avg", **shape),
    }
    method = Full(Options(epochs=1 if tiny else 15, lr=1e-3, head_lr_multiplier=1.0, augment="none"))
    digits = open_dataset("sample:digits")
    return {
        "recall.adaptive": recall("II", seed, tiny),
        "recall.fixed": recall("none", seed, tiny),
        **race(nets, method, digits, seed, train=4 if tiny else 60, test=20 if tiny else 600),
    }
