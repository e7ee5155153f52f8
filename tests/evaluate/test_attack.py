"""Attacks beside noise of their size: rivals, figures, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from foveal.core.errors import DataError, UsageError
from foveal.core.families.robust import Perturbation
from foveal.evaluate.attack import answers, figures, margin, rivals, scaled, sweep
from foveal.evaluate.audited import amplified, telling, verdict
from foveal.evaluate.corruptions import CORRUPTIONS, STRENGTHS

SIZE = 16


def one_sided(eps: float = 8 / 255, side: float = 1.0) -> Perturbation:
    """Brightens the left half and darkens the right."""
    delta = torch.full((3, SIZE, SIZE), eps * side)
    delta[..., SIZE // 2 :] *= -1
    return Perturbation(delta, torch.zeros(1, SIZE, SIZE), eps)


def patch() -> Perturbation:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 2:6, 3:7] = 1
    return Perturbation(torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * mask, mask, 1.0)


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Which half is brighter; unknown when the image is nearly black."""
    left, right = images[..., : SIZE // 2].mean((1, 2, 3)), images[..., SIZE // 2 :].mean((1, 2, 3))
    return (left > right + 0.02).long(), images.mean((1, 2, 3)) < 0.1


def pixels(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(96, 160, (count, SIZE, SIZE, 3), dtype=np.uint8)


def test_rivals_are_of_the_attacks_size():
    attack = one_sided()
    attack.delta *= torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    found = rivals(attack, draws=3, seed=1)
    for noise in found["noise"]:
        assert torch.equal(noise.delta.abs(), attack.delta.abs().max().expand_as(noise.delta))
        assert noise.delta.norm() >= attack.delta.norm()
        assert 0.3 < float((noise.delta > 0).float().mean()) < 0.7
    for shuffled in found["shuffled"]:
        assert not torch.equal(shuffled.delta, attack.delta)
        for channel in range(3):
            assert torch.equal(shuffled.delta[channel].flatten().sort()[0], attack.delta[channel].flatten().sort()[0])
        assert float(shuffled.delta.norm()) == pytest.approx(float(attack.delta.norm()), rel=1e-5)
        colours = {tuple(c) for c in shuffled.delta.flatten(1).T.tolist()}
        assert colours == {tuple(c) for c in attack.delta.flatten(1).T.tolist()}, "pixels were torn apart"
    again = rivals(attack, draws=3, seed=1)
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(found["noise"], again["noise"], strict=True))
    assert not torch.equal(found["noise"][0].delta, found["noise"][1].delta)


def test_rivals_of_a_patch_stay_inside_it():
    attack = patch()
    outside = attack.mask.expand(3, -1, -1) == 0
    for each in (each for drawn in rivals(attack).values() for each in drawn):
        assert not each.delta[outside].any()
        assert torch.equal(each.mask, attack.mask)
        x = torch.rand(1, 3, SIZE, SIZE)
        assert torch.equal(each(x)[0][outside], x[0][outside])
    assert set(rivals(attack)["noise"][0].delta[~outside].tolist()) == {0.0, 1.0}


def test_sizes_are_scaled_and_a_patch_is_not():
    assert torch.allclose(scaled(one_sided(), 0.25).delta, one_sided(2 / 255).delta)
    assert float(scaled(one_sided(), 0.25).budget) == pytest.approx(2 / 255)
    assert torch.equal(scaled(patch(), 0.25).delta, patch().delta)


def test_an_attack_that_knows_the_model_beats_noise_of_its_size():
    labels = np.zeros(40, np.int64)
    found = sweep(halves, pixels(), labels, one_sided(16 / 255), shares=(0.25, 1.0), draws=3)
    assert found["n"] == 40
    assert found["clean"]["accuracy"] == 1 - found["clean"]["fooled"] == 1.0
    whole = found["sizes"][-1]
    assert whole["attack"]["fooled"] == 1.0
    assert whole["noise"]["fooled"] == 0.0
    assert whole["shuffled"]["fooled"] < 0.3
    assert whole["attack"]["accuracy"] == 0.0
    assert whole["attack"]["linf"] == whole["noise"]["linf"] == pytest.approx(16 / 255)
    assert [row["eps"] for row in found["sizes"]] == pytest.approx([4 / 255, 16 / 255])
    assert telling(found["sizes"]) is whole
    told = verdict(found)
    assert told["tone"] == "care"
    assert "alters 100% of the answers, noise of the same size" in told["text"]
    useless = sweep(halves, pixels(), labels, one_sided(16 / 255, side=-1.0), draws=2)
    assert "found nothing that noise does not" in verdict(useless)["text"]


def test_a_model_that_noise_breaks_is_told_so():
    def brittle(images: Tensor) -> tuple[Tensor, Tensor]:
        return (images * 255).round().long().sum((1, 2, 3)) % 7, torch.zeros(len(images), dtype=torch.bool)

    found = sweep(brittle, pixels(60), None, one_sided(2 / 255), shares=(1.0,), draws=4)
    assert "accuracy" not in found["clean"]
    assert telling(found["sizes"]) is None
    assert "breaks under noise of this size" in verdict(found)["text"]


def test_figures_by_hand():
    clean, said = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 0])
    row = figures(clean, said, torch.tensor([True, True, False, False]), torch.tensor([0, 2, 1, 2]))
    assert row == {"fooled": 0.5, "unknown": 0.5, "silent": 0.25, "accuracy": 0.5}
    several = figures(torch.eye(3) > 0, torch.ones(3, 3) > 0, torch.zeros(3, dtype=torch.bool), torch.eye(3) > 0)
    assert several == {"fooled": 1.0, "unknown": 0.0, "silent": 1.0, "accuracy": 0.0}
    assert 0.09 < margin(0.5, 100) < 0.1
    assert margin(0.0, 100) > 0


def test_what_is_refused():
    labels = np.zeros(40, np.int64)
    with pytest.raises(UsageError, match="images are in \\[0, 1\\] here"):
        sweep(halves, pixels(), labels, one_sided(10.0))
    with pytest.raises(DataError, match="no images"):
        sweep(halves, pixels(0), labels[:0], one_sided())
    with pytest.raises(DataError, match="divide by 255"):
        answers(halves, pixels(2), lambda images: images * 255)


def test_the_change_is_drawn_with_grey_for_nothing():
    drawn = amplified(one_sided().delta.numpy())
    assert drawn.dtype == np.uint8
    assert (int(drawn.min()), int(drawn.max())) == (0, 255)
    assert (amplified(np.zeros((3, 4, 4))) == 128).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damage_grows_with_its_strength(name: str):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))
    kept = picture.copy()
    away = []
    for strength in STRENGTHS:
        damaged = CORRUPTIONS[name](picture, strength, np.random.default_rng(1))
        assert damaged.shape == picture.shape
        assert damaged.dtype == np.uint8
        away.append(float(np.abs(damaged.astype(float) - picture).mean()))
    assert 0 < away[0] < away[1] < away[2]
    assert np.array_equal(picture, kept)
