"""Context-aware motion forecasts: a penalty for forecasting as if there were no map.

Ben-Younes, Zablocki, Chen, Perez and Cord, "Raising context awareness in motion forecasting", CVPR Workshop on
Autonomous Driving 2022 (arXiv 2109.08048). The past alone explains most futures, so a network learns to overlook the
map. Every batch is therefore read twice by the same weights, with its maps and with none, and the sighted prior over a
latent z of K values is pushed away from the blind one:

    L = L_cvae(x, c) + L_cvae(x, none) - contrast * KL[ p(z | x, c) || stopgrad p(z | x, none) ]

where L_cvae = -log sum_z p(z | x, c) p(y | x, c, z) + a KL[ q(z | x, c, y) || p ] - I(z; x, c), and all K values are
enumerated. The blind encoding is detached: it trains the heads, never the encoders. No parameter is added, and a
forecast reads the maps once.

Needs a map for each window; without, `contrast=0` trains the plain CVAE. Departures: no neighbours; one dynamics, the
single integrator around the last velocity; the decoder is not fed its own steps; a plane of ones beside the map says
that there is one, so that a black map differs from none; gradients are not clipped; steps are measured in usual steps.

When NOT to use it: where the map says nothing it only adds noise; and with few windows compare `contrast=0`, since on
our small junctions the gain did not show. Probabilities are not calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveal.core.errors import DataError, UsageError
from foveal.core.families.motion import MAP_SIDE, Motion
from foveal.core.method import Spec, method
from foveal.core.options import option, options

WIDTH = 32
"""Numbers that the past, the map and each direction of the future are encoded in."""
SURE, FREE = 6.0, 0.07
"""Bound of a step's log-likelihood, and the KL between posterior and prior that costs nothing."""
TIE = 100.0
"""Weight `a` of that KL, once it has risen."""


def divergence(p: Float[Tensor, "B K"], q: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """KL[p || q] of categorical distributions given by their logits, in nats."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def information(logits: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """I(z; x, c) = H(mean over the batch of p) - mean of H(p), in nats."""
    log = logits.log_softmax(-1)
    mean = log.logsumexp(0) - math.log(len(log))
    return (log.exp() * log).sum(-1).mean() - (mean.exp() * mean).sum()


def bounded(logits: Float[Tensor, "B K"], bound: float) -> Float[Tensor, "B K"]:
    """Logits around their mean, within +-bound; a bound of 0 is none."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred.clamp(-bound, bound) if bound else centred


def log_likelihood(
    mean: Float[Tensor, "B K T 2"], variance: Float[Tensor, "B K T 2"], y: Float[Tensor, "B T 2"]
) -> Float[Tensor, "B K"]:
    """log p(y | z) of each of K futures: diagonal Gaussians, each step's share within +-SURE."""
    each = -0.5 * ((y[:, None] - mean).square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
    return each.clamp(-SURE, SURE).sum(-1)


def mixture(logits: Float[Tensor, "B K"], each: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """log sum_z p(z) p(y | z)."""
    return (logits.log_softmax(-1) + each).logsumexp(-1)


def rise(step: int, centre: int) -> float:
    """From 0 to 1 as a sigmoid around a step, a quarter of `centre` wide; 1 without a centre."""
    return 1 / (1 + math.exp(min(50.0, -4 * (step - centre) / centre))) if centre else 1.0


class Forecaster(nn.Module):
    """Past [B, H + 1, 2] and maps [B, 3, S, S] (or None) -> futures [B, K, T, 2] and their probabilities [B, K]."""

    steps: Tensor
    scale: Tensor

    def __init__(self, modes: int, future: int, width: int, maps: bool, scale: float) -> None:
        super().__init__()
        self.modes, self.future = modes, future
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.past = nn.LSTM(6, WIDTH, batch_first=True)
        self.map = map_encoder() if maps else None
        inner = WIDTH * (2 if maps else 1)
        self.prior = head(inner, modes)
        self.ahead = nn.LSTM(2, WIDTH, batch_first=True, bidirectional=True)
        self.posterior = head(inner + 4 * WIDTH, modes)
        self.start = nn.Linear(inner + modes, width)
        self.decoder = nn.GRU(inner + modes, width, batch_first=True)
        self.control = nn.Linear(width, 4)

    def encode(self, past: Tensor, maps: Tensor | None) -> Tensor:
        """Past, in usual steps, and maps -> [x; c]. With no maps, in a network that reads them, c is blind."""
        speed = differences(past)
        x = self.past(torch.cat([past, speed, differences(speed)], -1))[0][:, -1]
        if self.map is None:
            return x
        if maps is None:
            return torch.cat([x, self.map(x.new_zeros(1, 4, MAP_SIDE, MAP_SIDE)).expand(len(x), -1)], -1)
        present = maps.new_ones(len(maps), 1, *maps.shape[2:])
        return torch.cat([x, self.map(torch.cat([maps, present], 1))], -1)

    def posterior_of(self, encoded: Tensor, future: Tensor) -> Tensor:
        """Logits [B, K] of q(z | x, c, y)."""
        h, c = self.ahead(future)[1]
        return self.posterior(torch.cat([encoded, *h, *c], -1))

    def decode(self, encoded: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """[x; c] -> mean and variance of positions [B, K, T, 2] under each z, in usual steps."""
        size = len(encoded)
        each = torch.eye(self.modes, dtype=encoded.dtype, device=encoded.device).expand(size, -1, -1)
        given = torch.cat([encoded[:, None].expand(-1, self.modes, -1), each], -1).flatten(0, 1)
        hidden = self.decoder(given[:, None].expand(-1, self.future, -1), self.start(given).tanh()[None])[0]
        controls = self.control(hidden).float().unflatten(0, (size, self.modes))
        speed = (past[:, -1] - past[:, -2])[:, None, None] + controls[..., :2]
        return speed.cumsum(2), (2 * controls[..., 2:].clamp(-4, 3)).exp().cumsum(2)

    def forward(self, past: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor]:
        past = past / self.scale
        encoded = self.encode(past, maps)
        return self.decode(encoded, past)[0] * self.scale, self.prior(encoded).softmax(-1)


def differences(values: Tensor) -> Tensor:
    """[B, S, 2] -> what changed since the step before, the first as the second."""
    change = values.diff(dim=1)
    return torch.cat([change[:, :1], change], 1)


def map_encoder() -> nn.Module:
    """Maps [B, 4, 64, 64] -> [B, WIDTH]."""
    layers: list[nn.Module] = []
    sizes = zip((4, 10, 20, 10), (10, 20, 10, 1), (5, 5, 5, 3), (2, 2, 1, 1), strict=True)
    for inner, outer, mask, stride in sizes:
        layers += [nn.Conv2d(inner, outer, mask, stride), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(49, WIDTH))


def head(inner: int, modes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inner, WIDTH), nn.ReLU(), nn.Linear(WIDTH, modes))


@options
class Options:
    """What `cab` can be told."""

    modes: int = option(25, "values of the latent: possible futures", ge=2, le=1000)
    history: int = option(4, "steps read before the last observed one", ge=1, le=1000)
    future: int = option(12, "steps to forecast", ge=1, le=1000)
    contrast: float = option(5.0, "weight of the distance from the blind prior; 0: the plain CVAE", ge=0, le=1000)
    clip: float = option(5.0, "bound of the latent's logits in training, reached by and by; 0: none", ge=0, le=50)
    anneal: int = option(400, "step around which that bound and the posterior's weight rise; 0: at once", ge=0)
    width: int = option(128, "of the decoder", ge=1, le=4096)
    epochs: int = option(40, "passes over the training windows", ge=1, le=10_000)
    batch_size: int = option(256, "windows per step", ge=1, le=65_536)
    lr: float = option(3e-4, "highest learning rate", gt=0, le=1)


@method(
    Spec(
        family="motion",
        title="Context-aware motion forecasting",
        year=2021,
        arxiv="2109.08048",
        needs=frozenset(),
        tasks=("forecast",),
    ),
    Options,
)
class Cab(Motion):
    def __init__(self, options: Any = None) -> None:
        """
        Raises:
            UsageError: contrast without clip.
        """
        super().__init__(options)
        if self.options.contrast and not self.options.clip:
            raise UsageError(
                f"contrast={self.options.contrast:g} with clip=0: the loss has no lower bound; expected a clip above "
                "0, or contrast=0"
            )

    def window(self) -> tuple[int, int]:
        return self.options.history, self.options.future

    def attach(self, maps: bool, scale: float) -> Forecaster:
        if self.options.contrast and not maps:
            raise UsageError(
                "cab needs a context input to contrast with, and these tracks have no maps: add a column map, or use "
                "the plain CVAE, cab:contrast=0"
            )
        return Forecaster(self.options.modes, self.options.future, self.options.width, maps, scale)

    def after_step(self, model: Forecaster, step: int) -> None:
        model.steps.fill_(step)

    def cvae(
        self, model: Forecaster, encoded: Tensor, past: Tensor, future: Tensor, risen: float, bound: float
    ) -> tuple[Tensor, Tensor]:
        """L_cvae of a batch and the bounded logits [B, K] of its prior."""
        prior = bounded(model.prior(encoded).float(), bound)
        posterior = bounded(model.posterior_of(encoded, future).float(), bound)
        mean, variance = model.decode(encoded, past)
        fit = mixture(prior, log_likelihood(mean, variance, future)).mean()
        apart = divergence(posterior, prior).mean().clamp_min(FREE)
        return -fit + TIE * risen * apart - information(prior), prior

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            DataError: a coordinate that is not finite, or windows of another length.
        """
        past, future, maps = batch["past"].float(), batch["future"].float(), batch.get("maps")
        check(past, future, *self.window())
        past, future = past / model.scale, future / model.scale
        risen = rise(int(model.steps), self.options.anneal)
        bound = self.options.clip and 0.05 + (self.options.clip - 0.05) * risen
        encoded = model.encode(past, maps)
        sighted, prior = self.cvae(model, encoded, past, future, risen, bound)
        if maps is None:
            return {"loss": sighted}
        unseen = model.encode(past, None).detach()
        blind, other = self.cvae(model, unseen, past, future, risen, bound)
        apart = divergence(prior, other.detach()).mean()
        total = sighted + blind - self.options.contrast * apart
        return {"loss": total, "sighted": sighted.detach(), "blind": blind.detach(), "apart": apart.detach()}


def check(past: Tensor, future: Tensor, history: int, ahead: int) -> None:
    if past.shape[1] != history + 1 or future.shape[1] != ahead:
        raise DataError(
            f"windows of {past.shape[1]} observed and {future.shape[1]} future steps: expected {history} + 1 and "
            f"{ahead}"
        )
    if not bool(torch.isfinite(past).all() & torch.isfinite(future).all()):
        raise DataError("a coordinate is NaN or infinite: leave such steps out of the tracks")
