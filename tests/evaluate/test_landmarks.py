"""Landmark metrics against loops, their intervals, and the page."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveal.core.errors import DataError
from foveal.evaluate.landmarks import lengths, mean_places, measure_points, placed
from foveal.evaluate.landmarks_page import Shot, write_landmarks

SIZES = np.tile([100.0, 80.0], (12, 1))


def case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Found and true points of 12 images with 4 points, some not labelled."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(10, 70, (12, 4, 2))
    known = rng.random((12, 4)) < 0.8
    known[0] = [True, False, False, False]
    known[1] = False
    return xy + rng.normal(0, 4, xy.shape), np.where(known[..., None], xy, 0), known


def test_metrics_agree_with_loops():
    found, xy, known = case()
    shares, pixels = [], []
    for row in range(12):
        if not known[row].any():
            continue
        some = xy[row][known[row]]
        box = some.max(0) - some.min(0)
        length = math.hypot(*box) or math.hypot(100, 80)
        for k in range(4):
            if known[row, k]:
                off = math.dist(found[row, k], xy[row, k])
                pixels.append(off)
                shares.append(off / length)
    measured = measure_points(found, xy, known, SIZES, "abcd")
    assert measured["points"] == len(shares) == known.sum()
    assert measured["nme"]["value"] == pytest.approx(np.mean(shares))
    assert measured["pixels"]["value"] == pytest.approx(np.mean(pixels))
    assert measured["pck_05"]["value"] == pytest.approx(np.mean(np.array(shares) <= 0.05))
    assert measured["pck_10"]["value"] == pytest.approx(np.mean(np.array(shares) <= 0.1))
    curve = measured["curve"]
    assert curve["value"] == pytest.approx([np.mean(np.array(shares) <= t) for t in curve["thresholds"]])
    assert curve["value"] == sorted(curve["value"])
    for name in ("nme", "pck_05", "pck_10", "pixels"):
        assert measured[name]["low"] <= measured[name]["value"] <= measured[name]["high"]
    each = measured["per_point"]["b"]
    own = np.linalg.norm(found[:, 1] - xy[:, 1], axis=-1) / lengths(xy, known, SIZES)
    assert each["value"] == pytest.approx(own[known[:, 1]].mean())
    assert each["n"] == known[:, 1].sum()
    assert measure_points(found, xy, known, SIZES, "abcd") == measured, "the same seed gives the same intervals"


def test_nothing_off_and_nothing_drawn():
    _, xy, known = case()
    measured = measure_points(xy, xy, known, SIZES, "abcd", resamples=0)
    assert measured["nme"] == {"value": 0.0, "low": None, "high": None}
    assert measured["pck_05"]["value"] == 1.0


def test_a_mean_place_is_the_mean_in_a_square_of_side_one():
    xy = np.array([[[0.0, 0.0]], [[10.0, 10.0]]])
    sizes = np.array([[11.0, 11.0], [11.0, 11.0]])
    places = mean_places(xy, np.ones((2, 1), bool), sizes)
    assert placed(places, sizes) == pytest.approx(np.full((2, 1, 2), 5.0))
    assert placed(places, np.array([[22.0, 22.0]])) == pytest.approx(np.full((1, 1, 2), 10.5))
    assert mean_places(xy, np.zeros((2, 1), bool), sizes).tolist() == [[0.0, 0.0]]


def test_nothing_to_measure_on():
    found, xy, known = case()
    with pytest.raises(DataError, match="no point is labelled"):
        measure_points(found, xy, known & False, SIZES, "abcd")
    with pytest.raises(DataError, match="expected equal ones"):
        measure_points(found[:5], xy, known, SIZES, "abcd")


def test_the_page_and_the_card_say_it(tmp_path: Path):
    found, xy, known = case()
    names = ["left <eye>", "b", "c", "d"]
    guess = measure_points(xy + 20, xy, known, SIZES, names)
    metrics = {
        "split": "test", **measure_points(found, xy, known, SIZES, names), "references": {"mean place": guess},
        "history": [{"epoch": 1, "train_loss": 2.0, "val_nme": 0.2}, {"epoch": 2, "train_loss": 1.0, "val_nme": 0.1}],
    }  # fmt: skip
    manifest = {
        "classes": names, "method": {"name": "subpixel-heatmap", "options": {"tau": 10}}, "seed": 0, "seconds": 3.0,
        "backbone": {"name": "net", "origin": "random", "preprocessing": {"size": 64}},
        "data": {"name": "faces|x", "images": 12},
    }  # fmt: skip
    shots = [Shot(f"{row}.png", Image.new("RGB", (100, 80)), found[row], xy[row], known[row], 0.1) for row in (0, 2)]
    write_landmarks(tmp_path, manifest, metrics, {"macs": 5}, shots, shots[:1])
    page, card = (tmp_path / "report.html").read_text("utf-8"), (tmp_path / "README.md").read_text("utf-8")
    assert page.count("<image href=") == 3
    assert page.count('fill="#2fd0ff"') == 3 * 4
    assert page.count('stroke="#ff8a1f"') == int(2 * known[0].sum() + known[2].sum()), "true points where labelled"
    assert "left &lt;eye&gt;: " in page
    assert "<eye>" not in page
    assert f"{100 * metrics['nme']['value']:.1f}% of the size" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "keypoint-detection" in card
    assert "faces\\|x" in card
    worse = {**metrics, "references": {"mean place": {**guess, "nme": {"value": 0.0, "low": 0.0, "high": 0.0}}}}
    write_landmarks(tmp_path, manifest, worse, {"macs": 5}, shots, shots)
    assert "Do not trust it." in (tmp_path / "report.html").read_text("utf-8")
