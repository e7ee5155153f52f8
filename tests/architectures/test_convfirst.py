import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.convfirst import FusibleBlock, by_tiles, conv_first, mbconv
from foveal.core.errors import BackboneError

TINY = ("convfirstnet", {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def settled(block: nn.Module) -> nn.Module:
    """In eval mode, with batch statistics that change something."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
    return block.eval()


@pytest.mark.parametrize(("make", "parameters"), [(conv_first, 38_144), (mbconv, 52_352)])
def test_parameters_of_a_block(make, parameters: int):
    assert sum(p.numel() for p in make(64, 64).parameters()) == parameters


def naive(block: FusibleBlock, x: Tensor) -> Tensor:
    """The grouped convolution one output at a time; the pointwise layers are the block's own."""
    y = block.before(x)
    stride = block.conv.stride[0]
    height, width = (-(-side // stride) for side in x.shape[-2:])
    out = torch.zeros(len(x), y.shape[1], height, width)
    for o, i, j in itertools.product(range(y.shape[1]), range(height), range(width)):
        group = y[:, o // 8 * 8 : o // 8 * 8 + 8]
        for u, v in itertools.product(range(3), range(3)):
            a, b = i * stride + u - 1, j * stride + v - 1
            if 0 <= a < y.shape[2] and 0 <= b < y.shape[3]:
                out[:, o, i, j] += group[:, :, a, b] @ block.conv.weight[o, :, u, v]
    out = block.after(out)
    return x + out if block.residual else out


@pytest.mark.parametrize("make", [conv_first, mbconv])
@pytest.mark.parametrize(("out", "stride"), [(8, 1), (16, 2)])
def test_the_block_is_the_naive_one_gradients_too(make, out: int, stride: int):
    torch.manual_seed(0)
    block = settled(make(8, out, stride))
    assert block.residual == (stride == 1)
    found = []
    for run in (block, lambda x: naive(block, x)):
        torch.manual_seed(1)
        x = torch.randn(1, 8, 3, 4, requires_grad=True)
        block.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in block.parameters()]])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-3)


@pytest.mark.parametrize("make", [conv_first, mbconv])
@pytest.mark.parametrize("tile", [1, 4, 5, 100])
def test_tiles_give_what_layers_give_borders_included(make, tile: int):
    torch.manual_seed(0)
    block = settled(make(16, 16))
    x = torch.randn(2, 16, 9, 13)
    close(by_tiles(block, x, tile), block(x))


def test_the_split_decides_which_stages_convolve_first():
    model = timm.create_model(TINY[0], **TINY[1], split=1)
    kinds = [
        {isinstance(block.before, nn.Identity) for block in stage.modules() if isinstance(block, FusibleBlock)}
        for stage in model.stages
    ]
    assert kinds == [{True}, {False}, {False}, {False}]
    assert model.eval()(torch.randn(1, 3, 96, 64)).shape == (1, 1000)


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="12 channels: groups of 8"):
        conv_first(12, 12)
    with pytest.raises(BackboneError, match="split 5"):
        timm.create_model(TINY[0], split=5)
    with pytest.raises(BackboneError, match="tile 4, stride 1, training mode"):
        by_tiles(conv_first(8, 8), torch.zeros(1, 8, 4, 4), 4)
    with pytest.raises(BackboneError, match=r"dims \(8, 16\): expected four"):
        timm.create_model(TINY[0], dims=(8, 16))
