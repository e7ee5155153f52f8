"""geometry: what is drawn at a point is found at the moved point, in images, masks, boxes and keypoints alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from foveal.core.errors import UsageError
from foveal.data.geometry import Carry, about_centre, fitted, letterbox, moved, moved_boxes, resample, resizing

SIZE = (48, 40)
moves = st.builds(
    lambda angle, scale, x, y, mirror: about_centre(SIZE, angle=angle, scale=scale, shift=(x, y), mirror=mirror),
    st.floats(-180, 180), st.floats(0.6, 1.6), st.floats(-5, 5), st.floats(-5, 5), st.booleans(),
)  # fmt: skip
places = st.tuples(st.floats(17, 30), st.floats(14, 25))
quick = settings(max_examples=40, deadline=None)


def blob(x: float, y: float, sigma: float = 2.5) -> Tensor:
    """An image [1, 40, 48] with a soft spot at a point."""
    rows, columns = torch.arange(40.0)[:, None], torch.arange(48.0)[None]
    return torch.exp(-((rows - y).square() + (columns - x).square()) / (2 * sigma**2))[None]


def centre(image: Tensor) -> np.ndarray:
    """The centre of mass (x, y) of an image [1, H, W]."""
    weight = image[0].double()
    rows, columns = torch.arange(weight.shape[0]).double(), torch.arange(weight.shape[1]).double()
    total = weight.sum()
    return np.array([float((weight.sum(0) * columns).sum() / total), float((weight.sum(1) * rows).sum() / total)])


@quick
@given(moves, places)
def test_image_mask_box_and_keypoint_move_together(matrix: np.ndarray, place: tuple[float, float]):
    x, y = place
    spot = blob(x, y)
    sample = {
        "image": tv_tensors.Image(spot),
        "mask": tv_tensors.Mask((spot > 0.3).to(torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor([[x - 3.5, y - 3.5, x + 4.5, y + 4.5]]), format="XYXY", canvas_size=(40, 48)
        ),
        "points": [tv_tensors.KeyPoints(torch.tensor([[x, y]]), canvas_size=(40, 48))],
    }
    large = np.array([[1, 0, 20], [0, 1, 20], [0, 0, 1]])  # nothing leaves the canvas
    found = Carry(large @ matrix, (88, 80))(sample)
    expected = moved(large @ matrix, np.array([place]))[0]
    assert np.allclose(found["points"][0].numpy()[0], expected, atol=1e-3)
    assert np.allclose(centre(found["image"]), expected, atol=0.1)
    assert np.allclose(centre(found["mask"].float()), expected, atol=0.6)
    left, top, right, bottom = found["boxes"][0].tolist()
    assert np.allclose([(left + right) / 2 - 0.5, (top + bottom) / 2 - 0.5], expected, atol=1e-3)
    assert found["points"][0].canvas_size == (80, 88)
    assert found["boxes"].canvas_size == (80, 88)
    assert found["image"].shape[-2:] == (80, 88)


@quick
@given(moves, moves, st.lists(places, min_size=1, max_size=5))
def test_two_moves_are_one_and_turn_back(first: np.ndarray, second: np.ndarray, points: list[tuple[float, float]]):
    given_ = np.array(points)
    assert np.allclose(moved(second, moved(first, given_)), moved(second @ first, given_))
    assert np.allclose(moved(np.linalg.inv(first), moved(first, given_)), given_)
    torches = torch.from_numpy(given_)[None]
    assert np.allclose(moved(torch.from_numpy(first)[None], torches)[0].numpy(), moved(first, given_))


@quick
@given(st.integers(8, 60), st.integers(8, 60), st.integers(16, 64))
def test_a_letterbox_keeps_the_whole_image_and_its_shape(width: int, height: int, side: int):
    matrix = letterbox((width, height), side)
    edges = moved_boxes(matrix, np.array([[0.0, 0.0, width, height]]))[0]
    assert edges.min() > -1e-9
    assert edges.max() < side + 1e-9
    wide, high = edges[2] - edges[0], edges[3] - edges[1]
    assert max(wide, high) == pytest.approx(side)
    assert wide / high == pytest.approx(width / height)
    assert np.allclose((edges[:2] + edges[2:]) / 2, side / 2), "in the middle"


def test_identity_leaves_every_bit():
    image = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
    mask = torch.randint(0, 5, (40, 48), dtype=torch.uint8)
    found = Carry(np.eye(3), SIZE)({"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask), "other": 3})
    assert torch.equal(found["image"], image)
    assert torch.equal(found["mask"], mask)
    assert found["other"] == 3


def test_mirror_and_quarter_turn_are_exact():
    image = tv_tensors.Image(torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8))
    mirrored = Carry(about_centre((40, 40), mirror=True), (40, 40))(image)
    assert torch.equal(mirrored, image.flip(-1))
    turned = Carry(about_centre((40, 40), angle=90), (40, 40))(image)
    assert torch.equal(turned, torch.rot90(image, -1, (-2, -1))), "clockwise"


def test_a_resize_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
    ours = np.asarray(Carry(resizing((48, 40), (96, 80)), (96, 80))(photo), np.float32)
    theirs = np.asarray(photo.resize((96, 80), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(ours - theirs)[2:-2, 2:-2].max() <= 1
    small = np.asarray(Carry(resizing((48, 40), (12, 10)), (12, 10))(photo), np.float32)
    averaged = np.asarray(photo.resize((12, 10), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(small - averaged).max() <= 2, "what shrinks is averaged"


def test_boxes_of_any_format_and_inside_other_transforms():
    box = tv_tensors.BoundingBoxes(torch.tensor([[10, 8, 6, 4]]), format="XYWH", canvas_size=(40, 48))
    double = Carry(resizing((48, 40), (96, 80)), (96, 80))
    found = v2.Compose([double, v2.ClampBoundingBoxes()])(box)
    assert found.tolist() == [[20, 16, 12, 8]]
    assert found.format == tv_tensors.BoundingBoxFormat.XYWH


def test_torchvisions_own_resize_leaves_the_half_pixel_out():
    point = tv_tensors.KeyPoints(torch.tensor([[10.0, 8.0]]), canvas_size=(40, 48))
    assert v2.functional.resize(point, [80, 96]).tolist() == [[20.0, 16.0]]
    assert Carry(resizing((48, 40), (96, 80)), (96, 80))(point).tolist() == [[20.5, 16.5]]


def test_resample_says_what_it_has_seen():
    ones = torch.ones(1, 1, 40, 48)
    found, shown = resample(ones, torch.from_numpy(about_centre(SIZE, shift=(10, 0)))[None], SIZE)
    assert not shown[0, 0, :, :10].any()
    assert shown[0, 0, :, 10:].all()
    assert torch.allclose(found[shown], torch.ones(1), atol=1e-5)
    assert (found[0, 0, :, :9] == 0).all()


def test_a_photo_is_fitted_whole():
    pixels, matrix = fitted(Image.new("RGB", (64, 32), "white"), 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels[4:12].min() == 255
    assert pixels[:4].max() == 0
    assert np.allclose(moved(matrix, np.array([[31.5, 15.5]])), [[7.5, 7.5]])


@pytest.mark.parametrize("wrong", [np.zeros((3, 3)), np.eye(2), np.diag([1.0, np.nan, 1.0]), np.ones((3, 3))])
def test_a_matrix_that_cannot_be_turned_back(wrong: np.ndarray):
    with pytest.raises(UsageError, match="no affine matrix"):
        Carry(wrong, SIZE)
