import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.architectures._depthwise import DepthwiseConv2d, DepthwiseFunction


def plain(layer: DepthwiseConv2d) -> nn.Conv2d:
    """torch's own convolution with the same weights."""
    dim, (size, _) = layer.in_channels, layer.kernel_size
    conv = nn.Conv2d(dim, dim, size, padding=layer.padding, dilation=layer.dilation, groups=dim)
    conv.load_state_dict(layer.state_dict())
    return conv


def gradients(layer: nn.Module, x: Tensor, loud: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * loud).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize(("size", "dilation", "side"), [(7, 1, 9), (13, 1, 5), (9, 2, 12), (3, 1, 6)])
@pytest.mark.parametrize("last", [False, True])
def test_values_and_gradients_are_torchs(size: int, dilation: int, side: int, last: bool):
    torch.manual_seed(0)
    layer = DepthwiseConv2d(6, size, dilation)
    x, loud = torch.randn(3, 6, side, side + 2), torch.randn(3, 6, side, side + 2)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(gradients(layer, x, loud), gradients(plain(layer), x, loud), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_of_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: DepthwiseFunction.apply(x, w, (3, 3), (1, 1)), (x, weight))


def test_a_gradient_for_each_image():
    torch.manual_seed(0)
    layer = DepthwiseConv2d(3, 7)
    x = torch.randn(4, 3, 8, 8)

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight.detach(), x)
    for image, gradient in zip(x, found, strict=True):
        alone = copy.deepcopy(layer)
        alone(image[None]).square().sum().backward()
        torch.testing.assert_close(gradient, alone.weight.grad, atol=1e-4, rtol=1e-4)


def test_half_precision_and_frozen_weights_take_torchs_way():
    torch.manual_seed(0)
    layer = DepthwiseConv2d(4, 7)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain(layer)(x).sum(), x)[0])
