"""ConViT in small on solar cells, whole or defective, at 48 pixels, from a tenth of the labels and from all.

Four layers of width 96 on 6 x 6 patches, the first three gated or all four plain, in all else the same class, from
nothing. 'All' is 300 images of each class; both amounts are shown as often in total. Beside the accuracies, the mean
gate and attention distance of the first and the last gated layer of the net that saw all, on images of the test.
In these 150 steps gates stay within 0.01 of their start, 0.731: their order is weak evidence either way.
"""

import numpy as np
import torch

from foveal.architectures.convit import locality
from foveal.backbones.adapter import normalise
from foveal.core.seeds import generator
from foveal.data.images import to_pixels
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import few_and_rest, measure, shrunk, small_net

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "num_heads": 4, "depth": 4}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    elpv = open_dataset("sample:elpv")
    share, passes, tests = (4, 1, 20) if tiny else (30, 8, 600)
    rows, rest = few_and_rest(elpv.labels, 10 * share, seed)
    few, _ = few_and_rest(elpv.labels, share, seed)
    rest = np.sort(generator(seed, "test").permutation(rest)[:tests])
    dataset = shrunk(elpv, np.concatenate([rows, rest]), 48)
    test_rows = np.arange(len(rows), len(dataset))
    values: dict[str, float] = {}
    for amount, chosen, epochs in (
        ("few", np.searchsorted(rows, few), 10 * passes),
        ("all", np.arange(len(rows)), passes),
    ):
        method = Full(Options(epochs=1 if tiny else epochs, lr=1e-3, head_lr_multiplier=1.0))
        for kind, local in (("gated", 3), ("plain", 0)):
            net = small_net("convit_tiny_plus", seed, size=48, local_up_to_layer=local, **SMALL)
            outcome = measure(method, net, dataset, chosen, test_rows, seed)
            values[f"{kind}_{amount}.balanced_accuracy"] = outcome.balanced_accuracy
            values[f"{kind}_{amount}.seconds_per_step"] = outcome.seconds_per_step
            if (kind, amount) == ("gated", "all"):
                pixels = np.stack([to_pixels(dataset.image(int(row)), net.preprocessing) for row in test_rows[:64]])
                found = locality(outcome.model.eval(), normalise(torch.from_numpy(pixels), net.preprocessing))
                values["first.gate"], *_, values["last.gate"] = found.gates()
                for name, layer in (("first", 0), ("last", 2)):
                    rows_of = [head for head in found.heads if head.layer == layer]
                    values[f"{name}.distance"] = float(np.mean([head.distance for head in rows_of]))
                    values[f"{name}.start"] = float(np.mean([head.start for head in rows_of]))
    return values
