import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foveal.architectures.convnext_ladder import Step, convnext_step, layer_ids
from foveal.backbones.adapter import load_backbone
from foveal.core.errors import BackboneError

TINY = ("convnext_step_12", {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)})

GMACS = {
    "00": 4.09, "01": 4.09, "02": 4.53, "03": 4.42, "04": 2.35, "05": 5.27, "06": 4.64, "07": 4.07, "08": 4.10,
    "09": 4.15, "09_k9": 4.21, "09_k11": 4.29, "10": 4.15, "11": 4.15, "12": 4.15, "13": 4.15, "14": 4.46, "15": 4.46,
}  # fmt: skip
"""The paper's, multiply-accumulates of one image of 224 pixels."""


def small(step: int, **more):
    torch.manual_seed(0)
    model = convnext_step(step, **{"dims": (4, 8, 12, 16), "depths": (1, 2, 1, 2), "num_classes": 3, **more})
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("step", GMACS)
def test_operations_are_those_of_the_paper(step: str):
    with torch.device("meta"):
        model = timm.create_model(f"convnext_step_{step}").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[step], abs=0.01)


@pytest.mark.parametrize(("step", "count"), [(0, 25_557_032), (1, 25_557_032), (2, 28_628_520), (15, 28_589_128)])
def test_parameters_are_the_published_ones(step: int, count: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in convnext_step(step).parameters()) == count


def test_the_foot_of_the_ladder_is_timms_resnet_gradients_too():
    torch.manual_seed(0)
    theirs = timm.create_model("resnet50", num_classes=3)
    for parameter in theirs.parameters():  # timm starts the last norm of every branch at zero
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1)
    ours = convnext_step(0, num_classes=3)
    names = list(ours.state_dict())
    ours.load_state_dict(dict(zip(names, theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def naive(step: int, weights: Iterator[Tensor], x: Tensor, depths=(1, 2, 1, 2)) -> Tensor:
    """The net of steps 2 to 13 from its weights in order, in training mode; each convolution is a sum over offsets."""

    def norm(x: Tensor) -> Tensor:
        over, eps = ((0, 2, 3), 1e-5) if step < 13 else ((1,), 1e-6)
        x = (x - x.mean(over, keepdim=True)) / (x.var(over, unbiased=False, keepdim=True) + eps).sqrt()
        return x * next(weights)[:, None, None] + next(weights)[:, None, None]

    def act(x: Tensor, last_step: int = 99) -> Tensor:
        if step > last_step:
            return x
        return x.clamp(min=0) if step < 10 else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def conv(x: Tensor, stride: int = 1, pad: bool = True, bias: bool = False) -> Tensor:
        weight = next(weights)
        k, out = weight.shape[-1], [math.ceil(side / stride) for side in x.shape[-2:]]
        x = F.pad(x, (k // 2,) * 4) if pad else x
        total = 0
        for i in range(k):
            for j in range(k):
                seen = x[:, :, i : i + stride * out[0] : stride, j : j + stride * out[1] : stride]
                at = weight[:, :, i, j]
                mixed = torch.einsum("oc,bchw->bohw", at, seen) if weight.shape[1] > 1 else seen * at[:, 0, None, None]
                total = total + mixed
        return total + next(weights)[:, None, None] if bias else total

    if step < 3:
        x = F.max_pool2d(act(norm(conv(x, 2))), 3, 2, 1)
    else:
        x = act(norm(conv(x, 4, pad=False)), 10)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and index == 0 else 1
            if step < 7:
                y = act(norm(conv(x)))
                y = act(norm(conv(y, stride)))
                y = norm(conv(y))
            else:
                y = act(norm(conv(x, stride)), 10)
                y = conv(y, bias=step >= 12)
                y = act(norm(y) if step < 12 else y)
                y = conv(y, bias=step >= 12)
                y = norm(y) if step < 12 else y
            shortcut = norm(conv(x, stride)) if y.shape[1:] != x.shape[1:] else x
            x = act(shortcut + y, 10)
    return x.mean((2, 3)) @ next(weights).T + next(weights)


@pytest.mark.parametrize("step", range(2, 14))
def test_every_step_is_the_naive_one_gradients_too(step: int):
    model = small(step).double()
    x = torch.randn(3, 3, 64, 96, dtype=torch.double, requires_grad=True)
    inputs = [x, *model.parameters()]
    ours, theirs = model(x), naive(step, iter(list(model.parameters())), x)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_top_of_the_ladder_is_convnext_tiny():
    torch.manual_seed(0)
    theirs = timm.create_model("convnext_tiny").eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            parameter.data.normal_()
    ours = convnext_step(15).eval()
    found, expected = ours.state_dict(), theirs.state_dict()
    assert [(name, value.shape) for name, value in found.items()] == [(n, v.shape) for n, v in expected.items()]
    ours.load_state_dict(expected)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)


def test_the_last_step_adds_layer_scale_and_biases_to_the_one_before():
    before, after = small(14), small(15)
    added = after.state_dict().keys() - before.state_dict().keys()
    assert {name.rsplit(".", 1)[1] for name in added} == {"gamma", "bias"}
    assert before.state_dict().keys() <= after.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    mixed = after.state_dict() | before.state_dict()
    neutral = {name: torch.full_like(mixed[name], float(name.endswith("gamma"))) for name in added}
    after.load_state_dict(mixed | neutral)
    torch.testing.assert_close(after(x), before(x))


def test_blocks_in_both_memory_orders_are_equal():
    rows, maps = small(15), small(15, conv_mlp=True)
    maps.load_state_dict({n: v.reshape(maps.state_dict()[n].shape) for n, v in rows.state_dict().items()})
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(rows(x), maps(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", [12, 13, 14, 15])
def test_the_norm_of_a_block_comes_after_its_depthwise_convolution(step: int):
    """So the scale of that convolution does not matter; it would if the norm came before."""
    model = small(step)
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.weight.data *= 1000
            if module.bias is not None:
                module.bias.data *= 1000
    torch.testing.assert_close(model(x), before, atol=2e-2, rtol=2e-2)


def test_a_block_at_a_layer_scale_of_zero_does_nothing():
    model = small(15)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.zero_()
    x = torch.randn(1, 8, 6, 7)
    assert torch.equal(model.stages[1].blocks(x), x)


def test_branches_of_a_resnet_start_at_nothing():
    model = Step(step=9, dims=(4, 8, 12, 16)).eval()
    x = torch.randn(1, 4, 9, 9).relu()
    assert torch.equal(model.stages[0](x), x)


@pytest.mark.parametrize("step", [0, 4, 9, 15])
def test_maps_of_every_stage(step: int):
    net = convnext_step(step, features_only=True, dims=(4, 8, 12, 16), depths=(1, 1, 1, 1)).eval()
    assert net.feature_info.reduction() == [4, 8, 16, 32]
    times = 4 if step < 6 else 1
    assert [tuple(each.shape[1:]) for each in net(torch.randn(1, 3, 64, 96))] == [
        (times * width, 64 // stride, 96 // stride) for width, stride in ((4, 4), (8, 8), (12, 16), (16, 32))
    ]


def test_a_file_of_random_weights_makes_a_step_a_backbone(tmp_path: Path, cache: Path):
    model = convnext_step(4).eval()
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    loaded = load_backbone(f"convnext_step_04@{tmp_path / 'start.safetensors'}", size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.forward_head(model.forward_features(x), pre_logits=True))


def official_group(name: str) -> int:
    """Of ConvNeXt-S to XL, by cases."""
    parts = name.split(".")
    if parts[0] == "stem":
        return 0
    if parts[0] != "stages":
        return 13
    stage = int(parts[1])
    if stage == 3:
        return 12
    return stage + 1 + (int(parts[3]) // 3 if stage == 2 and parts[2] == "blocks" else 0)


@pytest.mark.parametrize("arch", ["convnext_small", "convnext_base"])
def test_layer_groups_are_twelve_and_the_rate_never_falls_towards_the_head(arch: str):
    with torch.device("meta"):
        model = timm.create_model(arch)
    ids = layer_ids(model)
    assert ids == {name: official_group(name) for name, _ in model.named_parameters()}
    assert sorted(set(ids.values()) - {0, 13}) == list(range(1, 13))
    rates = [0.8 ** (max(ids.values()) - ids[name]) for name, _ in model.named_parameters()]
    assert rates == sorted(rates)
    assert rates[-1] == 1


def test_layer_groups_of_the_steps():
    for step in (3, 12, 14, 15):
        with torch.device("meta"):
            model = convnext_step(step)
        ids = layer_ids(model)
        assert sorted(set(ids.values())) == list(range(8))
        assert list(ids.values()) == sorted(ids.values())
        assert {ids[name] for name in ids if name.startswith("stages.2.blocks.5")} == {4}
    with pytest.raises(BackboneError, match=r"parameter conv1\.0\.weight: layer groups are those of ConvNeXt"):
        layer_ids(timm.create_model("test_resnet"))


def test_bad_input_names_the_numbers():
    for step in (-1, 16, 2.5):
        with pytest.raises(BackboneError, match=rf"step {step}: expected a whole number from 0 .* to 15"):
            convnext_step(step)
    for step in (9, 15):
        with pytest.raises(BackboneError, match="kernel_size 4: expected an odd number"):
            convnext_step(step, kernel_size=4)
        with pytest.raises(BackboneError, match="31x64 pixels: the steps to ConvNeXt need at least 32x32"):
            small(step)(torch.zeros(2, 3, 31, 64))
        with pytest.raises(BackboneError, match=f"convnext_step_{step:02} with pretrained=True: no weights"):
            convnext_step(step, pretrained=True)
    with pytest.raises(BackboneError, match=r"dims \(4, 8, 12\): expected four numbers"):
        small(9, dims=(4, 8, 12))


def test_one_image_cannot_train_batch_norms():
    one = torch.randn(1, 3, 32, 32)
    for step in (0, 12):
        model = small(step)
        with pytest.raises(BackboneError, match="batch of one image in training: steps 0 to 12 have batch norms"):
            model(one)
        assert copy.deepcopy(model).eval()(one).shape == (1, 3)
    assert small(13)(one).shape == (1, 3)
