"""TVConv in small on solar cells, whole or defective, at 48 pixels, always framed alike: and scattered at random.

A narrow MobileNetV2 (generators of 16 channels and one middle layer) whose depthwise convolutions depend on the place,
against the same with ordinary ones: as many operations at inference. The second pair sees the same cells turned by up
to 180 degrees and moved by up to a quarter of their side, where a layout is no help. No augmentation anywhere.
"""

import io
from dataclasses import replace

from foveal.core.seeds import generator
from foveal.data.dataset import Dataset, Memory
from foveal.data.open import open_dataset
from foveal.methods.adapt.full import Full, Options
from foveal.train.small import few_and_rest, race, shrunk, small_net


def scattered(dataset: Dataset, seed: int) -> Dataset:
    """Every image turned about its centre and moved, once, at random."""
    rng = generator(seed, "scattered")
    images: list[bytes] = []
    for index in range(len(dataset)):
        image = dataset.image(index)
        reach = image.width // 4
        shift = (int(rng.integers(-reach, reach + 1)), int(rng.integers(-reach, reach + 1)))
        file = io.BytesIO()
        image.rotate(float(rng.uniform(-180, 180)), translate=shift).save(file, "PNG")
        images.append(file.getvalue())
    return replace(dataset, source=Memory(images))


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    cells = open_dataset("sample:elpv")
    chosen, _ = few_and_rest(cells.labels, 20 if tiny else 700, seed)
    framed = shrunk(cells, chosen, 48)
    method = Full(Options(epochs=1 if tiny else 10, lr=3e-3, head_lr_multiplier=1.0, augment="none"))
    values: dict[str, float] = {}
    for prefix, dataset in (("", framed), ("scattered_", scattered(framed, seed))):
        nets = {
            f"{prefix}{name}": small_net(
                "tvconv_mobilenetv2_x0_1", seed, size=48, img_size=48, hidden=16, layers=1, placed=name == "variant"
            )
            for name in ("variant", "depthwise")
        }
        values.update(race(nets, method, dataset, seed, train=8 if tiny else 400, test=20 if tiny else 600))
    return values
