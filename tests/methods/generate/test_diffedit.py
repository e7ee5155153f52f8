"""diffedit on a diffusion model in closed form: for each condition the images are Gaussian, so the noise is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from foveal.backbones.painter import schedule
from foveal.blocks.diffusion import alpha, backwards, clean, forwards, guided, move, noisy, timestep
from foveal.core.errors import UsageError
from foveal.methods.generate.diffedit import Diffedit, Options, contrast, thresholded

BLOCK = (slice(None), slice(4, 10), slice(6, 13))
"""6 x 7 cells of a 16 x 16 x 4 latent, where the two conditions differ."""


class Gaussian:
    """Under condition c the images are N(means[c], s^2); eps = sqrt(1 - a) (x - sqrt(a) mean) / (a s^2 + 1 - a)."""

    def __init__(self, s: float = 0.3, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.s, self.alphas = s, schedule()
        source = torch.randn(4, 16, 16, generator=rng, dtype=torch.float64)
        to = source.clone()
        by = 0.4 + 2 * torch.rand(4, 6, 7, generator=rng, dtype=torch.float64) ** 3
        to[BLOCK] += by * torch.randint(0, 2, by.shape, generator=rng).mul(2).sub(1)
        self.means = torch.stack([source, to, (source + to) / 2])
        self.empty = torch.tensor([2])
        self.x0 = (source + s * torch.randn(source.shape, generator=rng, dtype=torch.float64))[None]
        self.calls = 0

    def eps(self, x: Tensor, t: int, c: Tensor) -> Tensor:
        self.calls += 1
        a = float(self.alphas[t])
        return math.sqrt(1 - a) * (x - math.sqrt(a) * self.means[c]) / (a * self.s**2 + 1 - a)


SOURCE, TO = torch.tensor([0]), torch.tensor([1])
TRUTH = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
TRUTH[0][BLOCK] = True


def overlap(mask: Tensor) -> float:
    return float((mask & TRUTH).sum() / (mask | TRUTH).sum())


def test_the_mask_is_where_the_conditions_differ():
    world = Gaussian()
    difference = contrast(world.eps, world.alphas, world.x0, TO, SOURCE, 10, 0.5, seed=0)
    assert overlap(thresholded(difference, 0.5)) == 1.0
    low, high = difference.amin((1, 2)), difference.amax((1, 2))
    unclipped = ((difference - low) / (high - low) > 0.5)[:, None]
    assert overlap(unclipped) < 0.8, "cutting extreme differences is not optional"


def test_the_contrast_is_that_of_a_loop():
    world = Gaussian()
    found = contrast(world.eps, world.alphas, world.x0, TO, SOURCE, 3, 0.5, seed=4)
    rng, total = torch.Generator().manual_seed(4), torch.zeros(16, 16, dtype=torch.float64)
    a = float(world.alphas[499])
    for _ in range(3):
        noise = torch.randn(world.x0.shape, generator=rng, dtype=torch.float64)
        x = a**0.5 * world.x0 + (1 - a) ** 0.5 * noise
        for channel in range(4):
            apart = world.eps(x, 499, TO) - world.eps(x, 499, SOURCE)
            total += apart[0, channel].abs() / 4 / 3
    assert torch.allclose(found[0], total)


def test_equal_conditions_give_an_empty_mask_and_the_picture_back():
    world = Gaussian()
    with pytest.warns(UserWarning, match="the mask is empty: the model sees no difference"):
        made = Diffedit().edit(world, world.x0, SOURCE, SOURCE)
    assert not made.mask.any()
    assert torch.equal(made.x, world.x0)
    assert made.x is not world.x0


def test_outside_of_the_mask_nothing_changes_and_inside_it_the_new_text_is_approached():
    world = Gaussian()
    before, kept = float((world.x0 - world.means[1]).abs()[:, *BLOCK].mean()), world.x0.clone()
    last = before
    for strength in (0.3, 0.5, 0.8):
        made = Diffedit(Options(strength=strength, guidance=1)).edit(world, world.x0, TO, SOURCE)
        assert torch.equal(made.mask, TRUTH)
        assert float((made.x - world.x0).abs()[~made.mask.expand_as(made.x)].max()) == 0.0
        now = float((made.x - world.means[1]).abs()[:, *BLOCK].mean())
        assert now < last, "closer, the more so the stronger"
        last = now
    assert last < 0.8 * before
    assert torch.equal(world.x0, kept), "its argument changed"


def test_the_same_seed_gives_the_same_edit_bit_for_bit():
    world = Gaussian()
    first, again = (Diffedit(Options(steps=10)).edit(world, world.x0, TO, SOURCE, seed=3) for _ in range(2))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.mask, again.mask)


def test_a_mask_of_zeros_returns_the_input_and_of_ones_encodes_and_decodes():
    world = Gaussian()
    with pytest.warns(UserWarning, match="empty"):
        made = Diffedit().edit(world, world.x0, TO, SOURCE, mask=torch.zeros_like(TRUTH))
    assert torch.equal(made.x, world.x0)
    chosen = Options(steps=20, strength=0.5, guidance=1)
    whole = Diffedit(chosen).edit(world, world.x0, TO, SOURCE, mask=torch.ones_like(TRUTH))
    noise = backwards(world.eps, world.alphas, world.x0, world.empty, 20, 10)
    assert torch.equal(whole.x, forwards(world.eps, world.alphas, noise[-1], TO, 20, 10))


def test_there_and_back_the_error_halves_when_steps_double():
    world, errors = Gaussian(s=0.5), []
    for steps in (25, 50, 100, 200):
        there = backwards(world.eps, world.alphas, world.x0, world.empty, steps, steps)
        back = forwards(world.eps, world.alphas, there[-1], world.empty, steps, steps)
        errors.append(float((back - world.x0).square().mean().sqrt()))
    ratios = [more / less for more, less in pairwise(errors)]
    assert all(1.7 < ratio < 2.1 for ratio in ratios), ratios


@pytest.mark.parametrize("seed", range(5))
def test_the_pictures_own_noise_keeps_closer_to_it_than_fresh_noise(seed: int):
    world = Gaussian(seed=seed)
    ones = torch.ones_like(TRUTH)
    apart = {}
    for start in ("ddim", "noise"):
        method = Diffedit(Options(start=start, guidance=1))  # type: ignore[arg-type]
        apart[start] = float((method.edit(world, world.x0, TO, SOURCE, mask=ones, seed=seed).x - world.x0).norm())
    assert apart["ddim"] < apart["noise"]


def test_how_often_the_predictor_is_asked():
    for chosen in (Options(), Options(guidance=1, steps=20, strength=0.3, maps=3), Options(start="noise", maps=1)):
        for mask in (None, torch.ones_like(TRUTH)):
            world, method = Gaussian(), Diffedit(chosen)
            method.edit(world, world.x0, TO, SOURCE, mask=mask)
            assert world.calls == method.evaluations(given_mask=mask is not None)


def test_the_two_directions_are_one_formula():
    world = Gaussian()
    noise = torch.randn(world.x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noisy(world.x0, noise, 0.3)
    assert torch.allclose(clean(x, noise, 0.3), world.x0)
    assert torch.allclose(move(move(x, noise, 0.3, 0.7), noise, 0.7, 0.3), x)
    both = guided(world.eps, 4.0, world.empty)(x, 300, TO)
    nothing, told = world.eps(x, 300, world.empty), world.eps(x, 300, TO)
    assert torch.allclose(both, nothing + 4 * (told - nothing))
    assert alpha(world.alphas, 0, 50) == 1.0
    assert [timestep(k, 50, 1000) for k in (0, 1, 25, 50)] == [0, 19, 499, 999]


def test_the_forward_steps_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    world = Gaussian()
    theirs = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(20)
    x = world.x0.clone()
    for t in theirs.timesteps:  # it counts timesteps 950, 900, ..., 0; the noise is asked for at the same ones
        x = theirs.step(world.eps(x, int(t), TO), int(t), x).prev_sample
    ours, times = world.x0.clone(), [*range(0, 1000, 50)]
    for place in range(19, -1, -1):
        a = float(world.alphas[times[place]])
        to = float(world.alphas[times[place - 1]]) if place else 1.0
        ours = move(ours, world.eps(ours, times[place], TO), a, to)
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_those_of_diffusers(kind: str):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, 0.00085, 0.012, kind).alphas_cumprod.double()
    ours = schedule(kind, 1000, 0.00085, 0.012)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs, rtol=2e-4, atol=1e-7)


def test_bad_input_is_refused_with_what_to_do():
    world = Gaussian()
    with pytest.raises(UsageError, match=r"the mask has shape \(1, 1, 8, 8\), expected \(1, 1, 16, 16\)"):
        Diffedit().edit(world, world.x0, TO, SOURCE, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    from foveal.core import catalogue

    for wrong in ("strength=0", "strength=1.2", "maps=0"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            catalogue.create(f"diffedit:{wrong}")
