"""The contract of every generate method that the catalogue finds, on diffusion models of pixels and of latents."""

import copy
import dataclasses
import warnings

import pytest
import torch
from tests.contract.capabilities import hooks
from torch import Tensor

from foveal.backbones.painter import PixelPainter, Plan
from foveal.core import catalogue
from foveal.core.families.generate import Generate
from foveal.core.options import options_to_dict, parse_options

METHODS = catalogue.names("generate")
LIGHT = {"steps": 4, "maps": 2}


class Latent:
    """A predictor of noise in latents of 4 channels, told by vectors; linear, so that it is quick."""

    def __init__(self) -> None:
        self.alphas = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
        self.empty = torch.zeros(1, 4)

    def eps(self, x: Tensor, t: int, c: Tensor) -> Tensor:
        return 0.3 * x + c[:, :, None, None] * torch.linspace(0, 1, x.shape[-1]) * (t / 100)

    def condition(self, text: str) -> Tensor:
        return torch.full((1, 4), float(len(text)))


def pixels() -> PixelPainter:
    torch.manual_seed(0)
    return PixelPainter(Plan(("a", "bb"), 8, 1, (8, 8))).eval().requires_grad_(False)


def light(name: str) -> Generate:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Generate)
    return method


@pytest.mark.parametrize("kind", ["pixels", "latents"])
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, kind: str):
    painter = pixels() if kind == "pixels" else Latent()
    shape = (2, 1, 8, 8) if kind == "pixels" else (2, 4, 6, 10)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    to, source = painter.condition("a"), painter.condition("bb")
    kept = copy.deepcopy((x, to, source))
    before = copy.deepcopy(painter.state_dict()) if isinstance(painter, PixelPainter) else {}
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = light(name).edit(painter, x, to, source, seed=3)
        again = light(name).edit(painter, x, to, source, seed=3)
        other = light(name).edit(painter, x, to, source, seed=4)
    assert torch.equal(first.x, again.x), "the same seed gave another picture"
    assert torch.equal(first.mask, again.mask)
    assert other.x.shape == x.shape
    assert torch.equal(torch.random.get_rng_state(), state), "it drew from the caller's generator"
    assert torch.isfinite(first.x).all()
    assert first.mask.dtype == torch.bool
    assert first.mask.shape == (2, 1, *shape[-2:])
    outside = ~first.mask.expand_as(x)
    assert torch.equal(first.x[outside], x[outside]), "it changed what lies outside of the mask"
    assert not torch.equal(first.x, x)
    assert not first.x.requires_grad
    assert all(torch.equal(now, then) for now, then in zip((x, to, source), kept, strict=True))
    if isinstance(painter, PixelPainter):
        assert all(torch.equal(value, before[key]) for key, value in painter.state_dict().items())
        assert hooks(painter) == 0
    half = torch.zeros_like(first.mask)
    half[..., :4] = True
    drawn = light(name).edit(painter, x, to, source, mask=half, seed=3)
    assert torch.equal(drawn.x[..., 4:], x[..., 4:])
    assert torch.equal(drawn.mask, half)


@pytest.mark.parametrize("name", METHODS)
def test_a_crash_leaves_nothing_behind(name: str):
    painter = pixels()

    def crash(x: Tensor, t: int, c: Tensor) -> Tensor:
        PixelPainter.eps(painter, x, t, c)
        raise ArithmeticError

    painter.eps = crash  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError):
        light(name).edit(painter, torch.zeros(1, 1, 8, 8), painter.condition("a"), painter.empty)
    assert hooks(painter) == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", METHODS)
def test_options_go_to_json_and_back(name: str):
    method = light(name)
    assert parse_options(type(method).Options, options_to_dict(method.options), name) == method.options
