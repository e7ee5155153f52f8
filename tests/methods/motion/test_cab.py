"""Context-aware motion forecasting: its losses against sums written out, and what must hold exactly."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from foveal.core.errors import DataError, UsageError
from foveal.core.options import parse_options
from foveal.methods.motion.cab import (
    SURE,
    Cab,
    Forecaster,
    Options,
    bounded,
    divergence,
    information,
    log_likelihood,
    mixture,
    rise,
)

SMALL = {"modes": 5, "history": 3, "future": 4, "width": 8, "anneal": 0}


def batch(size: int = 6, maps: bool = True) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    found = {
        "past": torch.randn(size, 4, 2, generator=make).cumsum(1),
        "future": torch.randn(size, 4, 2, generator=make).cumsum(1),
    }
    return {**found, "maps": torch.rand(size, 3, 64, 64, generator=make)} if maps else found


def made(maps: bool = True, **options: float) -> tuple[Cab, Forecaster]:
    method = Cab(Options(**{**SMALL, **options}))
    torch.manual_seed(0)
    return method, method.attach(maps, 1.5)


def test_the_enumerated_likelihood_is_a_log_sum_exp_by_hand():
    make = torch.Generator().manual_seed(1)
    mean, y = torch.randn(2, 3, 4, 2, generator=make), torch.randn(2, 4, 2, generator=make)
    variance, logits = torch.rand(2, 3, 4, 2, generator=make) + 0.3, torch.randn(2, 3, generator=make)
    found = mixture(logits, log_likelihood(mean, variance, y))
    for b in range(2):
        weights = torch.exp(logits[b]) / torch.exp(logits[b]).sum()
        total = 0.0
        for k in range(3):
            density = 1.0
            for t in range(4):
                step = 1.0
                for axis in range(2):
                    away, spread = float(y[b, t, axis] - mean[b, k, t, axis]), float(variance[b, k, t, axis])
                    step *= math.exp(-away * away / (2 * spread)) / math.sqrt(2 * math.pi * spread)
                density *= min(max(step, math.exp(-SURE)), math.exp(SURE))
            total += float(weights[k]) * density
        assert float(found[b]) == pytest.approx(math.log(total), abs=1e-4)


def test_divergence_and_information_are_sums_written_out():
    make = torch.Generator().manual_seed(2)
    p, q = torch.randn(4, 5, generator=make), torch.randn(4, 5, generator=make)
    P, Q = p.softmax(-1).numpy(), q.softmax(-1).numpy()
    for b in range(4):
        assert float(divergence(p, q)[b]) == pytest.approx(sum(P[b] * np.log(P[b] / Q[b])), abs=1e-5)
    mean = P.mean(0)
    by_hand = -(mean * np.log(mean)).sum() + (P * np.log(P)).sum(1).mean()
    assert float(information(p)) == pytest.approx(by_hand, abs=1e-5)
    assert float(information(p[:1].expand(4, -1))) == pytest.approx(0, abs=1e-6)


def test_the_divergence_of_bounded_logits_is_bounded():
    worst = torch.full((1, 25), -100.0)
    worst[0, 0] = 100.0
    limit = 2 * 5.0 + math.log(24)
    assert limit == pytest.approx(13.18, abs=0.01)
    make = torch.Generator().manual_seed(3)
    for p, q in (
        (worst, -worst),
        (50 * torch.randn(200, 25, generator=make), 50 * torch.randn(200, 25, generator=make)),
    ):
        found = divergence(bounded(p, 5.0), bounded(q, 5.0))
        assert bool(((found >= -1e-6) & (found <= limit)).all())
    assert float(bounded(worst, 0.0).amax()) > 100, "a bound of 0 is none"
    assert float(bounded(worst, 0.0).mean()) == pytest.approx(0, abs=1e-4)


def test_the_contrast_reaches_the_sighted_prior_alone():
    method, model = made()
    given = batch()
    past = given["past"] / model.scale
    sighted = bounded(model.prior(model.encode(past, given["maps"])), 5.0)
    blind = bounded(model.prior(model.encode(past, None).detach()), 5.0).detach().requires_grad_()
    before = -divergence(sighted, blind.detach()).mean()
    before.backward()
    assert blind.grad is None
    assert model.map is not None
    assert all(float(p.grad.abs().sum()) > 0 for p in model.map.parameters() if p.grad is not None)

    weights = torch.cat([p.flatten() for p in model.prior.parameters()])
    by_loss = {}
    for contrast in (0.0, 5.0):
        method = Cab(Options(**SMALL, contrast=contrast))
        model.zero_grad()
        method.loss(model, given)["loss"].backward()
        by_loss[contrast] = torch.cat([p.grad.flatten() for p in model.prior.parameters() if p.grad is not None])
    model.zero_grad()
    sighted = bounded(model.prior(model.encode(past, given["maps"])), 5.0)
    with torch.no_grad():
        other = bounded(model.prior(model.encode(past, None)), 5.0)
    (-5 * divergence(sighted, other).mean()).backward()
    alone = torch.cat([p.grad.flatten() for p in model.prior.parameters() if p.grad is not None])
    assert torch.allclose(by_loss[5.0] - by_loss[0.0], alone, atol=1e-3 * float(by_loss[0.0].abs().max()))
    assert len(weights) == len(alone)


def test_the_blind_pass_trains_heads_and_no_encoder():
    method, model = made(contrast=0)
    given = batch()
    past, future = given["past"] / model.scale, given["future"] / model.scale
    loss, _ = method.cvae(model, model.encode(past, None).detach(), past, future, 1.0, 5.0)
    loss.backward()
    assert model.map is not None
    assert all(p.grad is None for p in [*model.map.parameters(), *model.past.parameters()])
    assert all(p.grad is not None for p in [*model.prior.parameters(), *model.decoder.parameters()])


def test_the_contrast_adds_no_parameter_and_changes_no_forecast():
    given = batch()
    (with_it, first), (without, second) = made(contrast=5), made(contrast=0)
    assert {name: p.shape for name, p in first.named_parameters()} == {
        name: p.shape for name, p in second.named_parameters()
    }
    for one, other in zip(
        with_it.forecast(first, given["past"], given["maps"]),
        without.forecast(second, given["past"], given["maps"]),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_sighted_context_that_is_the_null_context_has_no_distance():
    _, model = made()
    past = batch()["past"]
    null = model.encode(past, None)
    assert float(divergence(model.prior(null), model.prior(null.clone())).detach().abs().max()) == 0
    black = model.encode(past, torch.zeros(6, 3, 64, 64))
    assert not torch.allclose(black, null), "a black map is a map"


def test_weights_sum_to_one_and_the_most_likely_comes_first():
    method, model = made()
    given = batch()
    modes, weights = method.forecast(model, given["past"], given["maps"])
    assert modes.shape == (6, 5, 4, 2)
    assert torch.allclose(weights.sum(1), torch.ones(6))
    assert bool((weights.diff(dim=1) <= 0).all())
    own, chance = model(given["past"], given["maps"])
    assert torch.equal(modes[:, 0], own[torch.arange(6), chance.argmax(1)])


def test_the_loss_is_its_parts():
    method, model = made()
    parts = {name: value.detach() for name, value in method.loss(model, batch()).items()}
    assert float(parts["loss"]) == pytest.approx(
        float(parts["sighted"] + parts["blind"] - 5 * parts["apart"]), abs=1e-3
    )
    assert float(parts["apart"]) > 0
    plain, alone = made(maps=False, contrast=0)
    assert set(plain.loss(alone, batch(maps=False))) == {"loss"}


def test_the_bound_rises_with_the_steps():
    assert [round(rise(step, 400), 3) for step in (0, 400, 800)] == [0.018, 0.5, 0.982]
    assert rise(0, 0) == 1
    method, model = made(anneal=400)
    early = method.loss(model, batch())["loss"]
    method.after_step(model, 800)
    assert int(model.steps) == 800
    assert float(method.loss(model, batch())["loss"].detach()) > float(early.detach()) + 5, "100 nats' weight on 0.07"


def test_what_is_refused():
    with pytest.raises(UsageError, match="cab needs a context input to contrast with"):
        Cab().attach(False, 1.0)
    with pytest.raises(UsageError, match="contrast=5 with clip=0: the loss has no lower bound"):
        Cab(parse_options(Options, {"clip": 0}, "cab"))
    with pytest.raises(UsageError, match="greater than or equal to 2"):
        parse_options(Options, {"modes": 1}, "cab")
    method, model = made()
    given = batch()
    with pytest.raises(DataError, match=r"4 observed and 3 future steps: expected 3 \+ 1 and 4"):
        method.loss(model, {**given, "future": given["future"][:, :3]})
    broken = given["past"].clone()
    broken[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="a coordinate is NaN or infinite"):
        method.loss(model, {**given, "past": broken})
