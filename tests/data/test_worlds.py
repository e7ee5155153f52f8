from __future__ import annotations

import numpy as np

from foveal.data.worlds import KINDS, garbage


def test_shape_seed_and_independence_of_n():
    images = garbage(20, 48, seed=3)
    assert images.shape == (20, 48, 48, 3)
    assert images.dtype == np.uint8
    assert (images == garbage(20, 48, seed=3)).all()
    assert (images[:5] == garbage(5, 48, seed=3)).all()
    assert not (images == garbage(20, 48, seed=4)).all(axis=(1, 2, 3)).any()


def test_every_second_round_is_grey():
    images = garbage(2 * len(KINDS), 32, seed=0)
    coloured = np.ptp(images, axis=3).max(axis=(1, 2)) > 0
    assert coloured.tolist() == [True] * len(KINDS) + [False] * len(KINDS)


def test_pictures_differ_in_what_they_show():
    images = garbage(64, 64, seed=1).astype(float).mean(axis=3)
    contrast = images.std(axis=(1, 2))
    roughness = np.abs(np.diff(images, axis=2)).mean(axis=(1, 2))
    assert (contrast == 0).any()
    assert contrast.max() > 50
    assert (roughness[contrast > 5] < 1).any()
    assert roughness.max() > 30


def test_odd_sizes():
    assert garbage(9, 1, 0).shape == (9, 1, 1, 3)
    assert garbage(9, 33, 0).shape == (9, 33, 33, 3)
    assert garbage(0, 8, 0).shape == (0, 8, 8, 3)
