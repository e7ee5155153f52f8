import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from foveal.core.preprocessing import Preprocessing
from foveal.data.images import to_pixels
from foveal.ship.front import front

HALF = (0.5, 0.5, 0.5)
SETTINGS = {
    "lite0": Preprocessing(224, HALF, HALF, "bicubic", 0.875),
    "bilinear": Preprocessing(64, HALF, HALF, "bilinear", 0.95),
    "uncropped": Preprocessing(33, HALF, HALF, "bicubic", 1.0),
}
SIZES = [(300, 300), (451, 300), (300, 451), (37, 50), (1, 1), (3, 5), (256, 256), (257, 255), (224, 225), (70, 300)]
STRIPS = [(600, 20), (20, 600), (19, 1501), (1501, 19), (2000, 1), (161, 20)]
LARGE = [(1800, 1201), (999, 1000)]


@pytest.fixture(scope="module")
def run():
    sessions: dict[str, onnxruntime.InferenceSession] = {}

    def squares(setting: str, images: np.ndarray) -> np.ndarray:
        if setting not in sessions:
            model = front(SETTINGS[setting], 9, 18)
            onnx.checker.check_model(model, full_check=True)
            sessions[setting] = onnxruntime.InferenceSession(model.SerializeToString())
        return np.asarray(sessions[setting].run(None, {"image": images})[0]).transpose(0, 2, 3, 1)

    return squares


def noise(size: tuple[int, int], n: int = 1) -> np.ndarray:
    """Every value is as likely as any other: no rounding goes unnoticed."""
    return np.random.default_rng(size).integers(0, 256, (n, size[1], size[0], 3), dtype=np.uint8)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [*SIZES, *STRIPS, *LARGE], ids=str)
def test_not_one_value_differs_from_pil(run, setting, size):
    images = noise(size)
    assert np.array_equal(run(setting, images)[0], to_pixels(Image.fromarray(images[0]), SETTINGS[setting]))


def test_extremes_are_clipped_not_wrapped(run):
    checks = (np.indices((90, 130)).sum(0) // 3 % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, 3)
    expected = to_pixels(Image.fromarray(checks[0]), SETTINGS["lite0"])
    assert np.array_equal(run("lite0", checks)[0], expected)
    assert expected.min() == 0
    assert expected.max() == 255


def test_several_images_at_once(run):
    images = noise((97, 61), 5)
    got = run("bilinear", images)
    for image, square in zip(images, got, strict=True):
        assert np.array_equal(square, to_pixels(Image.fromarray(image), SETTINGS["bilinear"]))
    assert run("bilinear", images[:0]).shape == (0, 64, 64, 3)
