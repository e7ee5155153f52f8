import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import foveal.architectures  # noqa: F401
from foveal.core.errors import BackboneError

TINY = ("convnext_iso_large", {"embed_dim": 16, "depth": 4})


def small(**more):
    torch.manual_seed(0)
    return timm.create_model(TINY[0], num_classes=3, **{**TINY[1], **more}).eval()


def naive(model, x: Tensor) -> Tensor:
    """Patches as matrix rows, blocks channel by channel, all norms written out."""
    d = model.num_features
    grid = [side // 16 for side in x.shape[-2:]]
    patches = F.unfold(x, 16, stride=16).transpose(1, 2) @ model.stem.weight.flatten(1).T + model.stem.bias
    y = patches.transpose(1, 2).reshape(len(x), d, *grid)
    for block in (block for stage in model.stages for block in stage.blocks):
        padded = F.pad(y, (3, 3, 3, 3))
        h = sum(
            padded[:, :, i : i + grid[0], j : j + grid[1]] * block.conv_dw.weight[:, 0, i, j, None, None]
            for i in range(7)
            for j in range(7)
        )
        h = (h + block.conv_dw.bias[:, None, None]).permute(0, 2, 3, 1)
        h = F.layer_norm(h, (d,), block.norm.weight, block.norm.bias, 1e-6)
        h = F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        y = y + (h * block.gamma).permute(0, 3, 1, 2)
    v = F.layer_norm(y.mean((2, 3)), (d,), model.head.norm.weight, model.head.norm.bias, 1e-6)
    return v @ model.head.fc.weight.T + model.head.fc.bias


def test_the_net_is_the_naive_one_gradients_too():
    model = small(ls_init_value=0.5)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    found = []
    for run in (model, lambda x: naive(model, x)):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 48, 32, requires_grad=True)
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in model.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_blocks_at_a_layer_scale_of_zero_do_nothing():
    model = small(ls_init_value=0.0)
    x = model.stem(torch.randn(1, 3, 32, 48))
    assert torch.equal(model.stages(x), x)


def test_no_layer_scale_below_large():
    for name, scales in (("convnext_iso_small", 0), ("convnext_iso_base", 0), ("convnext_iso_large", 36)):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert sum(key.endswith("gamma") for key, _ in model.named_parameters()) == scales
        assert len(model.stages) == 4


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="depth 3: expected at least 4"):
        small(depth=3)
    with pytest.raises(BackboneError, match="12x64 pixels: isotropic ConvNeXt needs at least 16x16"):
        small()(torch.zeros(1, 3, 12, 64))
    with pytest.raises(BackboneError, match="convnext_iso_base with pretrained=True: no weights are published"):
        timm.create_model("convnext_iso_base", pretrained=True)
