"""Ten places on one photo, turned, scaled, sheared and shifted at random, 64 pixels, found in maps of 16 x 16 cells.

Three times the same small residual network, from the same weights, for the same number of epochs on the same images:
taught places between cells and read by the local softmax; taught rounded cells and read by the highest cell; and the
first with a second view that must agree.
"""

import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

from foveal.core.seeds import derive, seed_everything
from foveal.data.photos import warped
from foveal.data.points import Points, in_memory
from foveal.evaluate.landmarks import mean_places, measure_points, placed
from foveal.features.locate import locate
from foveal.methods.dense.subpixel_heatmap import Options, SubpixelHeatmap, decode, encode
from foveal.train.landmarks import LandmarkFeed
from foveal.train.loop import train
from foveal.train.small import small_net

SIZE, TRAIN, TEST, EPOCHS = 64, 160, 200, 6


class Rounded(SubpixelHeatmap):
    """What heatmaps were before: the nearest cell is taught, the highest cell is read."""

    def encode(self, points: Tensor, size: tuple[int, int]) -> Tensor:
        return encode(points.round(), size, self.options.sigma)

    def decode(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return decode(maps, window=1)


def nme(method: SubpixelHeatmap, points: Points, test: Points, seed: int) -> dict[str, float]:
    """Mean error, as a share of the size of the object and in pixels, on images that had no part in training."""
    seed_everything(derive(seed, "decoder"))
    backbone = small_net("test_resnet", seed, size=SIZE)
    preprocessing = backbone.preprocessing
    model = method.attach(backbone, points.xy.shape[1])
    feed = LandmarkFeed(points, preprocessing, augment=method.options.augment, views=method.views())
    with tempfile.TemporaryDirectory() as work:
        result = train(method, model, feed, seed, recipe=method.recipe(), device="cpu", work=Path(work))
    found = locate(method, result.model, test.images, preprocessing, points.xy.shape[1], device="cpu")
    measured = measure_points(found.xy, test.xy, test.known, found.sizes, test.names, resamples=0)
    return {"nme": measured["nme"]["value"], "pixels": measured["pixels"]["value"]}


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    train_count, test_count, epochs = (8, 8, 1) if tiny else (TRAIN, TEST, EPOCHS)
    images, xy = warped(train_count + test_count, SIZE, seed)
    points = in_memory(images[:train_count], xy[:train_count])
    test = in_memory(images[train_count:], xy[train_count:])
    common = {"epochs": epochs, "batch_size": 16, "lr": 3e-3, "augment": "none"}
    methods = {
        "subpixel": SubpixelHeatmap(Options(consistency=0, **common)),
        "rounded": Rounded(Options(consistency=0, **common)),
        "siamese": SubpixelHeatmap(Options(consistency=1, **common)),
    }
    sizes = np.full((test_count, 2), SIZE)
    guess = placed(mean_places(points.xy, points.known, np.full((train_count, 2), SIZE)), sizes)
    guessed = measure_points(guess, test.xy, test.known, sizes, test.names, resamples=0)
    values = {"mean-place.nme": guessed["nme"]["value"], "mean-place.pixels": guessed["pixels"]["value"]}
    for name, method in methods.items():
        values |= {f"{name}.{key}": value for key, value in nme(method, points, test, seed).items()}
    values["subpixel.wins"] = float(values["subpixel.nme"] < values["rounded.nme"])
    return values
