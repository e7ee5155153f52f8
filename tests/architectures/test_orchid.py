import pytest
import timm
import torch
from torch import Tensor

import foveal.architectures  # noqa: F401
from foveal.architectures.orchid import AdaptiveKernel, Orchid, filter_sequence, irfft_pair, rfft_pair
from foveal.core.errors import BackboneError

TINY = ("orchid_vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(dim: int = 8, l_max: int = 33, **more) -> Orchid:
    torch.manual_seed(0)
    return Orchid(dim, l_max, **more)


@pytest.mark.parametrize(("dim", "parameters"), [(128, 103_808), (768, 2_502_528)])
def test_parameters_of_the_operator(dim: int, parameters: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in Orchid(dim, 64).parameters()) == parameters


@pytest.mark.parametrize("length", [33, 64, 65])
def test_transforms_are_exact_and_the_matrices_equal_them(length: int):
    torch.manual_seed(0)
    x = torch.randn(2, 3, length)
    real, imaginary = rfft_pair(x)
    close(irfft_pair(real, imaginary, length), x, 1e-5)
    for fast, dense in zip((real, imaginary), rfft_pair(x, dense=True), strict=True):
        close(dense, fast, 1e-5)
    close(irfft_pair(real, imaginary, length, dense=True), x, 1e-5)


def wrapped(x: Tensor, k: Tensor) -> Tensor:
    """Circular convolution over the last axis, one place at a time."""
    length = x.shape[-1]
    return torch.stack(
        [sum(x[..., s] * k[..., (t - s) % length] for s in range(length)) for t in range(length)], dim=-1
    )


def naive(mixer: Orchid, u: Tensor) -> Tensor:
    """Type II without a transform: the adaptive kernel is a correlation, and every filter a double loop."""
    length, dim = u.shape[1:]
    p = mixer.in_proj(u)
    padded = torch.cat([torch.zeros_like(p[:, :2]), p], 1)
    weight, bias = mixer.short_conv.weight[:, 0], mixer.short_conv.bias
    short = sum(padded[:, j : j + length] * weight[:, j] for j in range(3)) + bias
    x0, x1, y = short.split(dim, dim=2)

    def conditioned(conv, norm) -> Tensor:
        c = torch.nn.functional.pad(p[..., -dim:], (0, 0, 1, 1))
        return norm(sum(c[:, j : j + length] * conv.weight[:, 0, j] for j in range(3)) + conv.bias)

    k = conditioned(mixer.adaptive.conv, mixer.adaptive.norm)
    q = conditioned(mixer.adaptive.query_conv, mixer.adaptive.query_norm)
    # rfft is orthonormal in H: conj(K) Q is the spectrum of the correlation over L
    h = torch.stack([sum(k[:, s] * q[:, (s + t) % length] for s in range(length)) for t in range(length)], -1) / length
    fixed = mixer.static.kernel(length, mixer.l_max) / length
    gated = (y * x1).transpose(1, 2)
    out = wrapped(gated, fixed + h) + mixer.static.bias[:, None] * gated
    out = x0.transpose(1, 2) * out
    long = u.transpose(1, 2)
    out = out + wrapped(long, mixer.residual.kernel(length, mixer.l_max) / length)
    return mixer.out_proj((out + mixer.residual.bias[:, None] * long).transpose(1, 2))


@pytest.mark.parametrize("length", [8, 9])
def test_the_layer_is_the_naive_one_gradients_too(length: int):
    mixer = layer(4, 12, adaptive="II")
    found = []
    for run in (mixer, lambda u: naive(mixer, u)):
        torch.manual_seed(1)
        u = torch.randn(2, length, 4, requires_grad=True)
        mixer.zero_grad()
        y = run(u)
        y.square().sum().backward()
        found.append([y.detach(), u.grad, *[p.grad.clone() for p in mixer.parameters()]])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-3)


def test_the_type_one_filter_from_its_definition():
    torch.manual_seed(0)
    kernel = AdaptiveKernel(4, "I")
    c = torch.randn(2, 9, 4)
    v = kernel.norm(kernel.conv(c.transpose(1, 2)).transpose(1, 2))
    power = torch.fft.fft(v, dim=1)[:, :5].abs().square() / 9
    padded = torch.nn.functional.pad(power, (0, 0, 1, 1))
    weight = kernel.frequency_conv.weight[:, 0]
    z = torch.stack([sum(padded[:, j : j + 5, d // 2] * weight[d, j] for j in range(3)) for d in range(8)], -1)
    z = kernel.frequency_norm(z + kernel.frequency_conv.bias)
    real, imaginary = kernel(c)
    close(real, z[..., 0::2].transpose(1, 2))
    close(imaginary, z[..., 1::2].transpose(1, 2))


@pytest.mark.parametrize("adaptive", ["I", "II"])
@pytest.mark.parametrize("length", [32, 33])
def test_shifts_pass_through_and_leave_the_filter_alone(adaptive, length: int):
    mixer = layer(adaptive=adaptive, circular=True)
    u = torch.randn(2, length, 8)
    close(mixer(u.roll(5, 1)), mixer(u).roll(5, 1))
    for a, b in zip(mixer.adaptive(u.roll(5, 1)), mixer.adaptive(u), strict=True):
        close(a, b)


@pytest.mark.parametrize("adaptive", ["I", "II"])
def test_the_filter_depends_on_the_input_and_without_it_the_mix_is_linear(adaptive):
    mixer = layer(adaptive=adaptive)
    x, c, other = torch.randn(1, 8, 33), torch.randn(1, 33, 8), torch.randn(1, 33, 8)
    assert (mixer.mix(x, c) - mixer.mix(x, other)).abs().max() > 1e-2
    fixed = layer(adaptive="none")
    close(fixed.mix(3 * x, c), 3 * fixed.mix(x, other), 1e-5)
    for norm in (m for m in mixer.adaptive.modules() if isinstance(m, torch.nn.LayerNorm)):
        torch.nn.init.zeros_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
    close(mixer.mix(x, c), mixer.mix(x, other), 1e-6)


def test_the_filter_is_as_strong_on_long_sequences():
    torch.manual_seed(0)
    kernel = AdaptiveKernel(8, "I")
    spread = [torch.cat(kernel(torch.randn(1, length, 8))).std().item() for length in (128, 16_384)]
    assert spread[1] == pytest.approx(spread[0], rel=0.2)
    assert spread[0] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("adaptive", ["I", "II", "none"])
def test_gradients_reach_everything_also_from_silence(adaptive):
    mixer = layer(adaptive=adaptive)
    for u in (torch.randn(2, 21, 8), torch.zeros(2, 21, 8)):
        mixer.zero_grad()
        mixer(u).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(mixer(torch.randn(2, 21, 8))).all()


def test_masked_tokens_have_no_say():
    mixer = layer()
    u = torch.randn(2, 20, 8)
    mask = torch.arange(20)[None] < torch.tensor([20, 12])[:, None]
    changed = u.clone()
    changed[1, 12:] = 7
    close(mixer(u, mask), mixer(changed, mask), 1e-6)
    assert not mixer(u, mask)[1, 12:].any()


def test_another_size_stretches_the_kernels():
    torch.manual_seed(0)
    model = timm.create_model(TINY[0], num_classes=3, **TINY[1]).eval()
    model.set_input_size((32, 96))
    assert {block.attn.l_max for block in model.blocks} == {48}
    assert model(torch.randn(1, 3, 32, 96)).shape == (1, 3)
    kernel = model.blocks[0].attn.static
    close(kernel.kernel(5, 5)[:, -1], kernel.kernel(9, 9)[:, -1], 1e-5)


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="40 tokens: expected 1 to l_max = 33"):
        layer()(torch.zeros(1, 40, 8))
    with pytest.raises(BackboneError, match="cannot be causal"):
        layer()(torch.zeros(1, 4, 8), is_causal=True)
    with pytest.raises(BackboneError, match="adaptive 'III'"):
        layer(adaptive="III")
    with pytest.raises(BackboneError, match=r"attn_mask of shape \(4,\): expected one entry a token, \(1, 4\)"):
        layer()(torch.zeros(1, 4, 8), torch.ones(4))
    with pytest.raises(BackboneError, match="set_input_size"):
        timm.create_model(TINY[0], dynamic_img_size=True)
    assert filter_sequence(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1)).shape == (1, 1)
