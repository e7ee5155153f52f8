import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.tvconv import PlacedConv2d, TVConv2d, convolve_by_place, to_tvconv
from foveal.core.errors import BackboneError

TINY = ("tvconv_mobilenetv2_x0_1", {"img_size": 64, "hidden": 4, "layers": 1, "affinity": 2})
OPTIONS = {"hidden": 4, "layers": 1, "affinity": 2}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(channels: int = 3, size: tuple[int, int] = (4, 5), **more) -> TVConv2d:
    torch.manual_seed(0)
    return TVConv2d(channels, size, **{**OPTIONS, **more})


def test_parameters_follow_the_formula():
    conv = TVConv2d(96, (12, 12))
    assert sum(p.numel() for p in conv.parameters()) == 684_864
    assert conv.fuse().macs == conv.fuse().weight.numel() == 124_416
    c, a, b, n, k, h, w = 5, 2, 4, 1, 5, 4, 5
    expected = a * h * w + 9 * a * b + 2 * b * h * w + n * (9 * b * b + 2 * b * h * w) + 9 * b * k * k * c
    assert sum(p.numel() for p in layer(c, kernel_size=k).parameters()) == expected


def naive(conv: TVConv2d, x: Tensor) -> Tensor:
    """By an unfolded copy, and the generator layer by layer."""
    maps = conv.affinity_maps
    for index in range(0, len(conv.generator) - 1, 3):
        maps = F.conv2d(maps, conv.generator[index].weight, padding=1)
        norm = conv.generator[index + 1]
        maps = (maps - maps.mean()) / (maps.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        maps = maps.clamp(min=0)
    weight = F.conv2d(maps, conv.generator[-1].weight, padding=1)
    k, (h, w) = conv.kernel_size, conv.size
    windows = F.unfold(x, k, padding=k // 2, stride=conv.stride).view(len(x), conv.channels, k * k, h, w)
    return (windows * weight.view(conv.channels, k * k, h, w)).sum(2)


@pytest.mark.parametrize(("kernel", "stride", "shape"), [(3, 1, (4, 5)), (3, 2, (7, 10)), (5, 2, (8, 9))])
def test_the_layer_is_the_naive_one_gradients_too(kernel: int, stride: int, shape: tuple[int, int]):
    conv = layer(kernel_size=kernel, stride=stride)
    found = []
    for run in (conv, lambda x: naive(conv, x)):
        torch.manual_seed(1)
        x = torch.randn(2, 3, *shape, requires_grad=True)
        conv.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in conv.parameters()]])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-3)
    assert conv.affinity_maps.grad.abs().sum() > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_equal_kernels_everywhere_are_a_depthwise_convolution(stride: int):
    torch.manual_seed(0)
    kernels = torch.randn(2, 1, 3, 3)
    x = torch.randn(2, 2, 7, 6)
    expected = F.conv2d(x, kernels, padding=1, stride=stride, groups=2)
    everywhere = kernels.view(2, 9, 1, 1).expand(-1, -1, *expected.shape[-2:])
    close(convolve_by_place(x, everywhere, stride), expected)
    close(convolve_by_place(x.transpose(2, 3).contiguous().transpose(2, 3), everywhere, stride), expected)


def test_a_fused_layer_is_the_same_and_depends_on_no_generator():
    conv = layer().eval()
    fused = conv.fuse()
    x = torch.randn(2, 3, 4, 5)
    close(fused(x), conv(x), 1e-6)
    assert list(fused.state_dict()) == ["weight"]
    with torch.no_grad():
        conv.affinity_maps.mul_(2)
    assert (conv(x) - fused(x)).abs().max() > 0
    half = PlacedConv2d(fused.weight.half())
    assert half.weight.dtype == torch.half
    assert half.resize((8, 10)).weight.dtype == torch.half
    close(half(x), fused(x), 1e-2)
    constant = PlacedConv2d(torch.ones(3, 9, 2, 2)).resize((5, 4))
    close(constant.weight, torch.ones(3, 9, 5, 4))


def test_what_moves_in_the_image_is_seen_by_another_kernel():
    conv = layer(2, (8, 8))
    plain = nn.Conv2d(2, 2, 3, padding=1, groups=2)
    x = torch.zeros(1, 2, 8, 8)
    x[:, :, 2, 2] = 1
    moved = x.roll(3, 3)
    inner = slice(4, 7)
    assert (plain(x).roll(3, 3) - plain(moved))[..., inner].abs().max() < 1e-6
    assert (conv(x).roll(3, 3) - conv(moved))[..., inner].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_any_model_can_be_swapped(name: str):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    swapped = to_tvconv(model, (64, 96), **OPTIONS)
    assert any(isinstance(each, TVConv2d) for each in swapped.modules())
    assert not any(isinstance(each, nn.Conv2d) and each.groups > 1 for each in swapped.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        fused = reparameterize_model(swapped)
        assert not any(isinstance(each, TVConv2d) for each in fused.modules())
        close(fused(x), swapped(x), 1e-4)
    with pytest.raises(BackboneError, match="TVConv is tied to a map"):
        swapped(torch.randn(1, 3, 96, 96))


def test_the_papers_maps():
    with torch.device("meta"):
        model = timm.create_model("tvconv_mobilenetv2_x1_0")
    convs = [each for each in model.modules() if isinstance(each, TVConv2d)]
    assert [each.size[0] for each in convs] == [96] + [48] * 2 + [24] * 3 + [12] * 7 + [6] * 4
    assert model.num_features == 512
    plain = timm.create_model("tvconv_mobilenetv2_x0_1", placed=False, img_size=64)
    assert not any(isinstance(each, TVConv2d) for each in plain.modules())


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="tied to a map of 4x5, the input makes 6x5"):
        layer()(torch.zeros(1, 3, 6, 5))
    with pytest.raises(BackboneError, match="kernel_size 4: expected an odd"):
        layer(kernel_size=4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(BackboneError, match=r"0 is not depthwise .3 to 8 channels in 1 groups"):
        to_tvconv(net, where="0")
    with pytest.raises(BackboneError, match=r"no depthwise convolution matches '\*' in Sequential"):
        to_tvconv(net)
