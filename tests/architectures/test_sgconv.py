import itertools

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveal.architectures  # noqa: F401
from foveal.architectures.sgconv import GlobalConv, SGConv, SGConvNet, convolve, scales, stretch
from foveal.core.errors import BackboneError

TINY = ("sgconvnext_tiny", {"img_size": 64, "depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "kernel_dim": 4})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("length", "count", "parameters"), [(1024, 5, 57_600), (4096, 7, 73_984), (16_384, 9, 90_368)])
def test_parameters_grow_with_the_logarithm_of_the_length(length: int, count: int, parameters: int):
    layer = SGConv(128, length, 64, bidirectional=False)
    assert scales(length, 64) == count
    assert layer.conv.reach >= length
    assert sum(p.numel() for p in layer.parameters()) == parameters
    longer = SGConv(128, 2 * length, 64, bidirectional=False)
    assert sum(p.numel() for p in longer.parameters()) == parameters + 64 * 128


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 300), st.integers(1, 2), st.booleans(), st.integers(1, 5))
def test_parameters_follow_the_formula(l_max: int, channels: int, bidirectional: bool, width: int):
    layer = SGConv(width, l_max, 4, channels, bidirectional=bidirectional)
    count = scales(l_max, 4) * 4 * width * channels * (1 + bidirectional)
    assert sum(p.numel() for p in layer.parameters()) == count + channels * width + channels * width**2 + width
    assert layer.conv.reach >= l_max > layer.conv.reach / 2 - 4


def test_the_kernel_is_the_explicit_one():
    torch.manual_seed(0)
    conv = GlobalConv(3, 32, 4, bidirectional=False, decay=(1.5, 3.0))
    parts = conv.kernel.detach().numpy()[:, 0]
    for channel, m in enumerate((1.5, 2.25, 3.0)):
        pieces = []
        for i, part in enumerate(parts[:, channel]):
            factor = 2 ** max(0, i - 1)
            places = (np.arange(4 * factor) + 0.5) / factor - 0.5  # the centres of the pixels stay where they are
            pieces.append(np.interp(places, np.arange(4), part) * m ** (len(parts) - 1 - i))
        whole = np.concatenate(pieces)
        assert len(whole) == conv.reach == 32
        found = conv.kernels()[0, channel].detach().numpy()
        np.testing.assert_allclose(found, whole / np.linalg.norm(whole), rtol=1e-4, atol=1e-6)


def test_farther_scales_are_weaker():
    torch.manual_seed(0)
    k = stretch(torch.randn(5, 1, 2000, 64), (2.0, 2.0))[0]
    spread = [piece.std().item() for piece in k.split([64, 64, 128, 256, 512], dim=1)]
    assert spread[0] == pytest.approx(16, rel=0.02)
    ratios = [b / a for a, b in itertools.pairwise(spread)]
    assert ratios == pytest.approx([0.5, 0.4, 0.5, 0.5], rel=0.1)


def naive(u: Tensor, k: Tensor, back: Tensor | None) -> Tensor:
    """One place and one distance at a time."""
    length = u.shape[-1]
    places = []
    for t in range(length):
        value = sum(k[..., j] * u[:, None, :, t - j] for j in range(min(t + 1, k.shape[-1])))
        if back is not None:
            value = value + sum(
                back[..., j] * u[:, None, :, t + j + 1] for j in range(min(length - t - 1, back.shape[-1]))
            )
        places.append(value)
    return torch.stack(places, -1)


@pytest.mark.parametrize("length", [7, 16])
@pytest.mark.parametrize("both", [False, True])
def test_fft_and_direct_are_the_naive_loop_gradients_too(length: int, both: bool):
    found = []
    for run in (convolve, lambda *given: convolve(*given, direct=True), naive):
        torch.manual_seed(0)
        u, k, back = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, length), (2, 3, 9), (2, 3, 9)))
        y = run(u, k, back if both else None)
        y.square().sum().backward()
        found.append([y.detach(), u.grad, k.grad, *([back.grad] if both else [])])
    for other in found[:-1]:
        for a, b in zip(other, found[-1], strict=True):
            close(a, b, 1e-3)


def test_causal_and_mirrored():
    torch.manual_seed(0)
    layer = SGConv(4, 32, 8, bidirectional=False)
    u = torch.randn(1, 20, 4)
    changed = u.clone()
    changed[:, 11:] += 1
    close(layer(u)[:, :11], layer(changed)[:, :11], 1e-5)
    assert (layer(u) - layer(changed))[:, 11].abs().max() > 1e-3
    k = torch.randn(1, 4, 32)
    y = convolve(u.transpose(1, 2), k, k[..., 1:])
    close(convolve(u.transpose(1, 2).flip(-1), k, k[..., 1:]).flip(-1), y)


def test_the_norm_is_kept_and_travels_with_the_weights():
    torch.manual_seed(0)
    conv, fresh = GlobalConv(4, 32, 8), GlobalConv(4, 32, 8)
    close(conv.kernels().norm(dim=-1), torch.ones(2, 4), 1e-5)
    norm = conv.kernel_norm.clone()
    with torch.no_grad():
        conv.kernel.mul_(3)
        quiet = conv(torch.ones(1, 4, 32))
    close(conv(torch.ones(1, 4, 32)), quiet, 1e-6)
    assert torch.equal(conv.kernel_norm, norm)
    close(conv.kernels().norm(dim=-1), torch.full((2, 4), 3.0), 1e-5)
    fresh.load_state_dict(conv.state_dict())
    assert torch.equal(fresh(torch.ones(1, 4, 32)), quiet)


def test_other_lengths():
    torch.manual_seed(0)
    conv = GlobalConv(2, 32, 8, bidirectional=False)
    u = torch.randn(1, 2, 50)
    with pytest.warns(UserWarning, match="50 values, kernel of 32: no context beyond"):
        long = conv(u)
    close(conv(u[..., :20]), long[..., :20], 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(SGConv(4, 32, 8)(torch.randn(1, 9, 4))).all()


def test_gradients_reach_everything_in_the_long_model():
    torch.manual_seed(0)
    model = SGConvNet(1, 10, 64, width=8, depth=2)
    logits = model(torch.randn(3, 64, 1))
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sizes_published():
    for name, million in (("sgconvnext_tiny", 29), ("sgconvnext_small", 51), ("sgconvnext_base", 90)):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, abs=1)


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="l_max 16 is shorter than kernel_dim 32"):
        SGConv(4, 16)
    with pytest.raises(BackboneError, match="causal=True with bidirectional=True"):
        SGConv(4, 64, causal=True)
