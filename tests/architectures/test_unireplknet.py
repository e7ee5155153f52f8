import copy
import itertools
import warnings

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.unireplknet import BRANCHES, DilatedReparam, Grn, UniRepBlock, dense_kernel
from foveal.core import cards
from foveal.core.errors import BackboneError

TINY = (
    "unireplknet_a",
    {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "kernel_sizes": ((3,), (13,), (13, 3), (13,))},
)


def tiny(**more):
    return timm.create_model(TINY[0], **{**TINY[1], "num_classes": 5, **more})


def randomised(model: nn.Module) -> nn.Module:
    """Batch statistics, layer scales and GRN away from where a wrong merge would pass."""
    torch.manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            if isinstance(module, Grn):
                module.weight.normal_(0, 0.5)
                if module.bias is not None:
                    module.bias.fill_(1)
            if isinstance(module, UniRepBlock) and module.gamma is not None:
                module.gamma.uniform_(0.4, 0.6)
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(5)
    return model.eval()


@pytest.mark.parametrize("name", timm.list_models("unireplknet_*"))
def test_published_counts_are_of_the_deploy_form(name: str):
    card = cards.read_card("unireplknet")["variants"][name]
    with torch.device("meta"):
        deploy = sum(p.numel() for p in timm.create_model(name, deploy=True).parameters())
    assert deploy == card["deploy_parameters"]
    published = float(card["published"].removesuffix("M"))
    assert abs(deploy / 1e6 - published) < (0.1 if "." in card["published"] else 1)  # rounded, or cut off (XL)
    assert abs(card["parameters"] / 1e6 - published) > abs(deploy / 1e6 - published)


def test_reparameterised_it_answers_the_same():
    model = randomised(tiny())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
        merged = copy.deepcopy(model)
        merged.reparameterize()
        after = merged(x)
        assert (before - after).abs().max() < 1e-4 * before.abs().max()
        assert (before - after).abs().max() < 1e-4
        assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
        again = {key: value.clone() for key, value in merged.state_dict().items()}
        merged.reparameterize()
        assert all(torch.equal(value, again[key]) for key, value in merged.state_dict().items())

        deploy = tiny(deploy=True).eval()
        deploy.load_state_dict(merged.state_dict())
        assert torch.equal(deploy(x), after)
        by_timm = reparameterize_model(model)
        assert torch.equal(by_timm(x), after)


def test_in_double_precision_the_merge_is_exact():
    model = randomised(tiny()).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        before = model(x)
        model.reparameterize()
        torch.testing.assert_close(model(x), before, atol=1e-10, rtol=1e-10)


def naive(block: DilatedReparam, x: Tensor) -> Tensor:
    """Every branch tap by tap, its batch norm written out."""
    height, width = x.shape[2:]
    total = torch.zeros_like(x)
    for conv, norm in zip(block.convs, block.norms, strict=True):
        k, r = conv.kernel_size[0], conv.dilation[0]
        out = torch.zeros_like(x)
        for u, v in itertools.product(range(k), repeat=2):
            du, dv = r * (u - k // 2), r * (v - k // 2)
            rows = slice(max(0, -du), min(height, height - du))
            columns = slice(max(0, -dv), min(width, width - dv))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            shifted = torch.zeros_like(x)
            shifted[:, :, rows, columns] = x[
                :, :, rows.start + du : rows.stop + du, columns.start + dv : columns.stop + dv
            ]
            out = out + shifted * conv.weight[None, :, 0, u, v, None, None]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        total = total + (out - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return total


@pytest.mark.parametrize("size", BRANCHES)
def test_the_merged_kernel_is_the_naive_sum_gradients_too(size: int):
    torch.manual_seed(size)
    block = randomised(DilatedReparam(3, size)).double()
    x = torch.randn(1, 3, 12, 15, dtype=torch.double, requires_grad=True)
    expected = naive(block, x)
    torch.testing.assert_close(block(x), expected)
    kernel, bias = block.merged()
    assert kernel.shape == (3, 1, size, size)
    one = torch.nn.functional.conv2d(x, kernel, bias, padding=size // 2, groups=3)
    torch.testing.assert_close(one, expected)
    for ours in (block(x), one):
        (a,), (b,) = (torch.autograd.grad(each.sin().sum(), x, retain_graph=True) for each in (ours, expected))
        torch.testing.assert_close(a, b)
    ours = torch.autograd.grad(block(x).sin().sum(), list(block.parameters()))
    theirs = torch.autograd.grad(naive(block, x).sin().sum(), list(block.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_dilated_kernel_is_stuffed_with_zeros():
    kernel = torch.arange(1.0, 10).view(1, 1, 3, 3)
    dense = dense_kernel(kernel, 2, 7)[0, 0]
    assert torch.equal(dense[1:6:2, 1:6:2], kernel[0, 0])
    assert dense.count_nonzero() == 9


def test_a_channel_that_is_nought_everywhere_has_a_finite_gradient():
    grn, x = Grn(3), torch.randn(2, 4, 4, 3)
    x[..., 1] = 0
    x.requires_grad_()
    grn(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert grn.weight.grad is not None
    assert grn.weight.grad.isfinite().all()


def test_grn_is_timms_with_a_shift():
    from timm.layers.grn import GlobalResponseNorm

    ours, theirs = Grn(6), GlobalResponseNorm(6)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_()
            getattr(theirs, name).copy_(parameter)
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_other_signals_need_only_another_number_of_channels():
    spectrogram = torch.randn(1, 1, 40, 101)
    assert tiny(in_chans=1).eval()(spectrogram).shape == (1, 5)


def test_it_warns_before_what_cannot_be_undone():
    model = tiny().train()
    with pytest.warns(UserWarning, match="train mode"):
        model.reparameterize()
    with pytest.warns(UserWarning, match="batch norms are gone"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UniRepBlock(8, 6), "kernel size 6"),
        (lambda: UniRepBlock(8, 19), "kernel size 19"),
        (lambda: timm.create_model("unireplknet_a", depths=(2, 2, 4, 2)), r"depths \(2, 2, 4, 2\).*10 numbers"),
        (lambda: tiny(kernel_sizes=((3,), (13,), (13,), (13,))), r"\(1, 1, 1, 1\) kernel sizes for depths \(1, 1, 2"),
        (lambda: tiny()(torch.zeros(1, 3, 64, 20)), "64x20"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message):
        build()
