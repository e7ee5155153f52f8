"""The feed of pretraining: views that differ, each what its seed says, and no label anywhere."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.train.helpers import SMALL, tiny_dataset

from foveal.core.families.pretrain import Views
from foveal.train.views import ViewFeed

DATASET = tiny_dataset(8)


def feed(**changes: object) -> ViewFeed:
    return ViewFeed(DATASET, SMALL, dataclasses.replace(Views(), **changes), "tiny")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_each_view_is_drawn_for_itself():
    views = feed(count=3).example(1, rng())["views"]
    assert views.shape == (3, 16, 16, 3)
    assert not np.array_equal(views[0], views[1])
    assert not np.array_equal(views[1], views[2])
    assert np.array_equal(views, feed(count=3).example(1, rng())["views"])
    assert not np.array_equal(views, feed(count=3).example(1, rng(1))["views"])


def test_labels_are_not_in_it():
    assert set(feed().example(0, rng())) == {"views"}


def test_a_whole_image_is_the_image_or_its_mirror():
    square = DATASET.image(2).crop((0, 0, 20, 20))
    from PIL import Image

    from foveal.train.views import view

    whole = np.asarray(square.resize((16, 16), Image.Resampling.BILINEAR, box=(0, 0, 20, 20)))
    found = [view(square, SMALL, Views(area=(1, 1)), rng(seed)) for seed in range(40)]
    exact = [each for each in found if np.abs(each.astype(int) - whole).max() <= 1]
    mirrored = [each for each in found if np.abs(each[:, ::-1].astype(int) - whole).max() <= 1]
    assert exact
    assert mirrored
    never = [view(square, SMALL, Views(area=(1, 1), mirror=False), rng(seed)) for seed in range(40)]
    assert not [each for each in never if np.abs(each[:, ::-1].astype(int) - whole).max() <= 1]


def test_colour_moves_the_brightness():
    plain = [feed(area=(1, 1)).example(0, rng(seed))["views"].mean() for seed in range(8)]
    moved = [feed(area=(1, 1), colour=0.4).example(0, rng(seed))["views"].mean() for seed in range(8)]
    assert np.std(moved) > 3 * np.std(plain)


def test_batches_are_normalised_and_keep_their_views_apart():
    examples = [feed(count=2).example(index, rng(index))["views"] for index in range(4)]
    ready = feed(count=2).ready({"views": torch.from_numpy(np.stack(examples))})["views"]
    assert ready.shape == (4, 2, 3, 16, 16)
    expected = (examples[3][1].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    assert ready[3, 1].numpy() == pytest.approx(expected, abs=1e-5)


def test_other_views_or_images_are_another_feed():
    known = {feed().fingerprint(), feed(count=2).fingerprint(), feed(colour=0.1).fingerprint()}
    known.add(ViewFeed(DATASET, SMALL, Views(), "other").fingerprint())
    assert len(known) == 4
