"""InceptionNeXt: the mixer against loops, and what a swap keeps, drops and reports."""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.inception_next import InceptionDWConv2d
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.inceptionnext import inception, inceptionize
from foveal.core.errors import BackboneError

TINY = ("inception_next_iso_small", {"embed_dim": 16, "depth": 4})


def small(**more: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(TINY[0], num_classes=3, **{**TINY[1], **more}).eval()


def shifted_sum(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise correlation with zeros around, one shift at a time: x [B, C, H, W], kernel [C, 1, h, w]."""
    height, width = kernel.shape[-2:]
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2))
    rows, columns = x.shape[-2:]
    return sum(
        padded[..., i : i + rows, j : j + columns] * kernel[:, 0, i, j, None, None]
        for i in range(height)
        for j in range(width)
    )


def naive_mixer(mixer: InceptionDWConv2d, x: Tensor) -> Tensor:
    g = mixer.dwconv_hw.weight.shape[0]
    parts = [x[:, : x.shape[1] - 3 * g]]
    for place, conv in enumerate((mixer.dwconv_hw, mixer.dwconv_w, mixer.dwconv_h)):
        start = x.shape[1] - (3 - place) * g
        parts.append(shifted_sum(x[:, start : start + g], conv.weight) + conv.bias[:, None, None])
    return torch.cat(parts, 1)


def gradients(run: Any, module: nn.Module, size: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(size, requires_grad=True)
    module.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *[p.grad.clone() for p in module.parameters()]]


def test_the_mixer_is_the_naive_one_gradients_too():
    torch.manual_seed(0)
    for dim, options in ((24, {}), (16, {"band": 5, "branch_ratio": 0.25}), (18, {"branch_ratio": 1 / 3})):
        mixer = inception(dim, **options)
        size = (2, dim, 9, 14)
        for a, b in zip(
            gradients(mixer, mixer, size), gradients(partial(naive_mixer, mixer), mixer, size), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_branches_are_convolutions_of_their_slices_and_the_rest_passes():
    torch.manual_seed(0)
    mixer, x = inception(32), torch.randn(2, 32, 15, 13)
    with torch.no_grad():
        y = mixer(x)
    assert torch.equal(y[:, :20], x[:, :20])
    branches = ((20, mixer.dwconv_hw, (1, 1)), (24, mixer.dwconv_w, (0, 5)), (28, mixer.dwconv_h, (5, 0)))
    for start, conv, padding in branches:
        alone = F.conv2d(x[:, start : start + 4], conv.weight, conv.bias, padding=padding, groups=4)
        torch.testing.assert_close(y[:, start : start + 4], alone, atol=1e-6, rtol=1e-6)


def test_kernels_with_a_one_in_the_middle_do_nothing():
    mixer, x = inception(24), torch.randn(1, 24, 12, 12)
    for conv in mixer.children():
        nn.init.zeros_(conv.bias)
        nn.init.zeros_(conv.weight)
        height, width = conv.kernel_size
        conv.weight.data[:, 0, height // 2, width // 2] = 1
    assert torch.equal(mixer(x), x)


def test_channels_last_agrees():
    torch.manual_seed(0)
    mixer, x = inception(48), torch.randn(2, 48, 14, 14)
    last = copy.deepcopy(mixer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), mixer(x), atol=1e-5, rtol=1e-5)


def test_channels_of_a_branch_that_is_off_pass():
    x = torch.randn(1, 16, 8, 8)
    for place, branch in enumerate(("square", "horizontal", "vertical")):
        mixer = inception(16, off=(branch,))
        y, start = mixer(x), 10 + 2 * place
        assert torch.equal(y[:, start : start + 2], x[:, start : start + 2])
        for other in {10, 12, 14} - {start}:
            assert not torch.allclose(y[:, other : other + 2], x[:, other : other + 2], atol=1e-3)
    assert torch.equal(inception(16, off=("square", "horizontal", "vertical"))(x), x)


def test_ablations_of_both_nets_lose_the_weights_of_the_branch():
    kernels = {"square": 9, "horizontal": 11, "vertical": 11}
    with torch.device("meta"):
        pyramid = numbers(timm.create_model("inception_next_tiny", depths=(1, 1, 2, 1)))
        iso = numbers(timm.create_model("inception_next_iso_small", depth=4))
        for branch, kernel in kernels.items():
            mixer = partial(inception, off=(branch,))
            without = numbers(timm.create_model("inception_next_tiny", depths=(1, 1, 2, 1), token_mixers=mixer))
            assert pyramid - without == (12 + 24 + 2 * 48 + 96) * (kernel + 1)
            assert iso - numbers(timm.create_model(TINY[0], depth=4, off=(branch,))) == 4 * 48 * (kernel + 1)


def numbers(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def test_timm_has_the_pyramids():
    counts = {"atto": 4_156_520, "tiny": 28_055_680, "small": 49_374_016, "base": 86_672_136}
    with torch.device("meta"):
        assert {size: numbers(timm.create_model(f"inception_next_{size}")) for size in counts} == counts


def test_a_swapped_convnext_keeps_all_else():
    model = timm.create_model("convnext_tiny").train()
    model.stages[0].eval()
    model.stem.requires_grad_(False)
    model.stages[3].blocks[0].conv_dw.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made, report = inceptionize(model, input_size=(64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(isinstance(block.conv_dw, nn.Conv2d) for stage in model.stages for block in stage.blocks)
    assert model.training
    assert not model.stages[0].training
    after = made.state_dict()
    kept = before.keys() & after.keys()
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert {name.partition(".conv_dw.")[0] + ".conv_dw" for name in before.keys() ^ after.keys()} == set(
        report.replaced
    )
    widths = [dim for depth, dim in ((3, 96), (3, 192), (9, 384), (3, 768)) for _ in range(depth)]
    assert len(report.replaced) == len(widths) == 18
    assert report.skipped == {}
    assert numbers(model) - numbers(made) == sum(50 * dim - 34 * (dim // 8) for dim in widths)
    assert (report.before.parameters, report.after.parameters) == (numbers(model), numbers(made))
    places = [side**2 for depth, side in ((3, 16), (3, 8), (9, 4), (3, 2)) for _ in range(depth)]
    gone = sum(n * (49 * dim - 31 * (dim // 8)) for dim, n in zip(widths, places, strict=True))
    assert report.before.macs - report.after.macs == gone
    moved = [4 * (2 * n * dim + 50 * dim) for dim, n in zip(widths, places, strict=True)]
    assert report.before.depthwise_bytes == sum(moved)
    moved = [4 * (2 * n * 3 + 34) * (dim // 8) for dim, n in zip(widths, places, strict=True)]
    assert report.after.depthwise_bytes == sum(moved)
    flags = {name: each.requires_grad for name, each in made.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {
        *(f"stem.{name}" for name, _ in model.stem.named_parameters()),
        *(f"stages.3.blocks.0.conv_dw.{name}" for name, _ in made.stages[3].blocks[0].conv_dw.named_parameters()),
    }
    assert made.training
    assert not made.stages[0].blocks[0].conv_dw.training
    assert made(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_weights_that_are_carried_over():
    """Centre, sum over rows, sum over columns, element by element; 5x5 bands are padded and 13x13 ones cropped."""
    for size, bias in ((5, True), (7, False), (13, True)):
        torch.manual_seed(size)
        old = nn.Conv2d(16, 16, size, padding=size // 2, groups=16, bias=bias)
        mixer, _ = inceptionize(old, input_size=(16, 16))
        assert isinstance(mixer, InceptionDWConv2d)
        middle = size // 2
        for k in range(2):
            square, wide, tall = (old.weight[10 + 2 * place + k, 0].tolist() for place in range(3))
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    assert mixer.dwconv_hw.weight[k, 0, 1 + i, 1 + j] == square[middle + i][middle + j]
            for i in range(-5, 6):
                inside = 0 <= middle + i < size
                row = sum(wide[r][middle + i] for r in range(size)) if inside else 0
                column = sum(tall[middle + i][c] for c in range(size)) if inside else 0
                assert mixer.dwconv_w.weight[k, 0, 0, 5 + i].item() == pytest.approx(row, abs=1e-6)
                assert mixer.dwconv_h.weight[k, 0, 5 + i, 0].item() == pytest.approx(column, abs=1e-6)
        for conv, start in ((mixer.dwconv_hw, 10), (mixer.dwconv_w, 12), (mixer.dwconv_h, 14)):
            expected = old.bias[start : start + 2] if bias else torch.zeros(2)
            assert torch.equal(conv.bias, expected)


def test_bands_answer_as_before_where_the_image_does_not_change_along_the_other_axis():
    torch.manual_seed(0)
    old = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    mixer, _ = inceptionize(old, input_size=(16, 16))
    rows, columns = torch.randn(1, 8, 20, 1).expand(-1, -1, -1, 20), torch.randn(1, 8, 1, 20).expand(-1, -1, 20, -1)
    inner = slice(3, -3)
    with torch.no_grad():
        for x, channel in ((columns, 6), (rows, 7)):
            torch.testing.assert_close(mixer(x)[:, channel, inner, inner], old(x)[:, channel, inner, inner])


def test_random_weights_if_asked_for():
    old = nn.Conv2d(16, 16, 7, padding=3, groups=16)
    mixer, _ = inceptionize(old, transfer=False, input_size=(8, 8))
    assert not torch.allclose(mixer.dwconv_hw.weight, old.weight[10:12, :, 2:5, 2:5], atol=1e-4)
    assert not mixer.dwconv_hw.bias.any()


def test_what_cannot_be_replaced_stays_with_a_notice():
    def conv(size: int = 7, **more: Any) -> nn.Conv2d:
        return nn.Conv2d(16, 16, size, groups=16, **{"padding": size // 2, **more})

    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        conv(), conv(stride=2), conv(dilation=2, padding=6), conv(6), conv(padding=0), conv(padding_mode="circular"),
        Own(16, 16, 5, padding=2, groups=16), conv(3), nn.Conv2d(16, 16, 7, padding=3), conv(padding="same"),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"stay as they are: 1 \(stride 2\), 2 \(dilation 2\)"):
        made, report = inceptionize(model, input_size=(32, 32))
    assert report.replaced == ("0", "9")
    assert list(report.skipped) == ["1", "2", "3", "4", "5", "6"]
    assert report.skipped["3"] == "an even kernel, 6x6"
    assert report.skipped["4"] == "padding (0, 0) of zeros, expected (3, 3) of zeros"
    assert report.skipped["5"] == "padding (3, 3) of circular, expected (3, 3) of zeros"
    assert report.skipped["6"] == "a Own"
    assert [type(each) for each in made[1:9]] == [type(each) for each in model[1:9]]
    with pytest.raises(BackboneError, match=r"nothing to replace: .* and stride 1 but 1 \(stride 2\)"):
        inceptionize(nn.Sequential(conv(3), conv(stride=2)))


def test_other_nets_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made, report = inceptionize(timm.create_model("efficientnet_b0", num_classes=2), input_size=(64, 64))
    assert len(report.replaced) == 7
    assert list(report.skipped.values()) == ["stride 2", "stride 2"]
    assert made.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    grey = timm.create_model("test_mambaout", num_classes=2, in_chans=1)
    made, report = inceptionize(grey)
    assert len(report.replaced) == sum(each.endswith(".conv") for each, _ in grey.named_modules() if "blocks" in each)
    assert report.after.macs < report.before.macs
    assert made.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 2)


def test_bad_input_names_the_numbers():
    for name in ("resnet18", "inception_next_atto"):
        model = timm.create_model(name)
        with pytest.raises(BackboneError, match=r"nothing to replace: .* no depthwise convolution of at least 5x5"):
            inceptionize(model)
    narrow = nn.Sequential(nn.Conv2d(4, 4, 7, padding=3, groups=4))
    with pytest.raises(
        BackboneError, match=r"0: 4 channels at branch_ratio 0.125: a branch has no channels, .* 8 chan"
    ):
        inceptionize(narrow)
    with pytest.raises(BackboneError, match=r"7 channels at branch_ratio 0.125: a branch has no channels"):
        inception(7)
    with pytest.raises(BackboneError, match="branch_ratio 0: a branch has no channels, expected a ratio above 0"):
        inception(16, branch_ratio=0)
    with pytest.raises(BackboneError, match="band 10: expected an odd number, such as 11"):
        inception(16, band=10)
    with pytest.raises(BackboneError, match=r"branch_ratio 0.5: three branches of 8 channels are more than 16"):
        inception(16, branch_ratio=0.5)
    with pytest.raises(BackboneError, match="no branch 'diagonal': expected square, horizontal, vertical"):
        inception(16, off=("diagonal",))
    with pytest.raises(BackboneError, match="depth 3: expected at least 4"):
        small(depth=3)
    with pytest.raises(BackboneError, match="12x64 pixels: isotropic InceptionNeXt needs at least 16x16"):
        small()(torch.zeros(1, 3, 12, 64))


def naive_net(model: Any, x: Tensor) -> Tensor:
    """Patches as matrix rows, mixers by shifts, norms and MLPs written out; eval mode."""

    def batch_norm(norm: Any, y: Tensor) -> Tensor:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return y * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]

    d, grid = model.num_features, [side // 16 for side in x.shape[-2:]]
    conv, norm = model.stem
    patches = F.unfold(x, 16, stride=16).transpose(1, 2) @ conv.weight.flatten(1).T + conv.bias
    y = batch_norm(norm, patches.transpose(1, 2).reshape(len(x), d, *grid))
    for block in (block for stage in model.stages for block in stage.blocks):
        h = batch_norm(block.norm, naive_mixer(block.token_mixer, y)).permute(0, 2, 3, 1)
        h = F.gelu(h @ block.mlp.fc1.weight[:, :, 0, 0].T + block.mlp.fc1.bias)
        h = h @ block.mlp.fc2.weight[:, :, 0, 0].T + block.mlp.fc2.bias
        y = y + (h * block.gamma).permute(0, 3, 1, 2)
    v = F.layer_norm(y.mean((2, 3)), (d,), model.head.norm.weight, model.head.norm.bias, 1e-6)
    return v @ model.head.fc.weight.T + model.head.fc.bias


def test_the_net_at_one_resolution_is_the_naive_one_gradients_too():
    model = small()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.normal_(0, 0.2) if "var" not in name else value.uniform_(0.5, 2)
    size = (2, 3, 48, 32)
    for a, b in zip(gradients(model, model, size), gradients(partial(naive_net, model), model, size), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
