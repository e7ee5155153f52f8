import itertools

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.affnet import AdaptiveFilter
from foveal.core.errors import BackboneError
from foveal.features.graph import to_onnx

TINY = ("affnet_et", {"dims": (8, 16, 16, 24, 32), "depths": (1, 2, 1, 1, 1)})


def filter_of(dim: int = 16, groups: int = 8, scale: float = 0.5) -> AdaptiveFilter:
    torch.manual_seed(0)
    layer = AdaptiveFilter(dim, groups)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, scale)
    return layer


def naive_mask(layer: AdaptiveFilter, spectrum: Tensor) -> Tensor:
    """The mask network in complex numbers, group by group."""

    def split(part: Tensor, function) -> Tensor:
        return torch.complex(function(part.real), function(part.imag))

    side = spectrum.shape[1] // layer.fc1.groups
    out = []
    for g in range(layer.fc1.groups):
        z = spectrum[:, g * side : (g + 1) * side].permute(0, 2, 3, 1)
        for fc in (layer.fc1, layer.fc2):
            z = z @ torch.complex(*fc.weight[:, g]) + torch.complex(*fc.bias[:, g])
            if fc is layer.fc1:
                z = split(z, torch.relu)
        out.append(split(z, lambda part: torch.sign(part) * (part.abs() - 0.01).clamp(min=0)).permute(0, 3, 1, 2))
    return torch.cat(out, 1)


def naive(layer: AdaptiveFilter, x: Tensor) -> Tensor:
    """A circular convolution, place by place, with the kernel that the image's own mask is the transform of."""
    height, width = x.shape[2:]
    mask = naive_mask(layer, torch.fft.rfft2(x, norm="ortho"))
    kernel = torch.fft.irfft2(mask, s=(height, width), norm="backward")
    rows = []
    for i, j in itertools.product(range(height), range(width)):
        total = torch.zeros_like(x[:, :, 0, 0])
        for u, v in itertools.product(range(height), range(width)):
            total = total + kernel[:, :, (i - u) % height, (j - v) % width] * x[:, :, u, v]
        rows.append(total)
    return torch.stack(rows, -1).unflatten(-1, (height, width)) + x


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (3, 4)])
def test_the_mixer_is_a_circular_convolution_with_its_own_kernel_gradients_too(height: int, width: int):
    layer = filter_of(8, 4)
    x = torch.randn(2, 8, height, width, requires_grad=True)
    expected = naive(layer, x)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    variables = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).sin().sum(), variables)
    theirs = torch.autograd.grad(expected.sin().sum(), variables)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_mask_of_one_doubles_and_a_mask_of_zero_keeps():
    layer = filter_of()
    x = torch.randn(2, 16, 6, 9)
    with torch.no_grad():
        for fc in (layer.fc1, layer.fc2):
            fc.weight.zero_()
            fc.bias.zero_()
        torch.testing.assert_close(layer(x), x)
        layer.fc2.bias[0] = 1.01
        torch.testing.assert_close(layer(x), 2 * x)
        layer.fc2.bias[0] = 0.009
        layer.fc2.bias[1] = -0.0099
        torch.testing.assert_close(layer(x), x)


def test_small_parts_are_shrunk_to_zero_each_by_itself():
    layer = filter_of()
    with torch.no_grad():
        layer.fc2.weight.zero_()
        layer.fc2.bias[0], layer.fc2.bias[1] = 0.005, 0.5
    real, imaginary = layer.mask(torch.randn(1, 16, 4, 3), torch.randn(1, 16, 4, 3))
    assert torch.equal(real, torch.zeros_like(real))
    torch.testing.assert_close(imaginary, torch.full_like(imaginary, 0.49))


def test_the_mask_reads_phases_so_the_mixer_does_not_move_with_the_image():
    layer = filter_of()
    x = torch.randn(1, 16, 8, 8)
    moved = x.roll((3, 2), (2, 3))

    def parts(image: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.fft.rfft2(image, norm="ortho")
        return z.real, z.imag

    assert (layer.mask(*parts(x))[0] - layer.mask(*parts(moved))[0]).abs().max() > 0.1
    assert (layer(moved) - layer(x).roll((3, 2), (2, 3))).abs().max() > 0.1
    original = layer.mask
    layer.mask = lambda real, imaginary: original((real.square() + imaginary.square()).sqrt(), 0 * imaginary)
    torch.testing.assert_close(layer(moved), layer(x).roll((3, 2), (2, 3)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [16, 64])
def test_parameters_of_the_mixer(dim: int):
    assert sum(p.numel() for p in AdaptiveFilter(dim).parameters()) == 4 * dim * (dim // 8) + 4 * dim


@pytest.mark.parametrize(("height", "width"), [(7, 7), (1, 5), (8, 3)])
def test_any_size_gives_real_numbers(height: int, width: int):
    out = filter_of()(torch.randn(1, 16, height, width))
    assert out.shape == (1, 16, height, width)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_under_autocast_the_spectrum_stays_in_float32():
    layer = filter_of()
    x = 100 * torch.randn(1, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = layer(x.bfloat16())
        assert torch.equal(layer(x), filter_of()(x))
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), layer(x.bfloat16().float()), atol=2, rtol=1e-2)


def test_memory_grows_with_the_map_and_not_its_square():
    """Elements saved for the backward pass, at four times the places."""
    layer, saved = filter_of(), []
    for side in (8, 16, 32):
        count = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(1, 16, side, side, requires_grad=True))
        saved.append(count)
    assert saved[2] < 4.2 * saved[1] < 4.2 * 4.2 * saved[0]


def test_sizes_that_differ_export_each_with_dft_matrices(tmp_path):
    layer = filter_of().eval()
    for height, width in ((6, 8), (7, 5)):
        x = torch.randn(2, 16, height, width)
        to_onnx(layer, (x,), tmp_path / "m.onnx", ["x"], ["y"], {"x": {0: "N"}, "y": {0: "N"}})
        (answer,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), layer(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mixer", ["fixed", "identity"])
def test_ablations_are_whole_nets(mixer: str):
    model = timm.create_model(TINY[0], mixer=mixer, **TINY[1]).eval()
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
    assert any("mixer" in name for name in model.state_dict()) == (mixer == "fixed")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdaptiveFilter(20), "20 channels are no multiple of its 8 groups"),
        (lambda: timm.create_model("affnet_et", dims=(32, 48, 64)), r"dims \(32, 48, 64\)"),
        (lambda: timm.create_model(TINY[0], **TINY[1])(torch.zeros(1, 3, 24, 64)), "24x64"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message):
        build()
