"""Receptive fields by formula and by gradient, variances on the way, and what is left behind."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.convolutions import Moments, convolutions, gradients, radius, watch
from foveal.backbones.lsuv import lsuv
from foveal.core.errors import BackboneError, DataError


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def positive(module: nn.Module) -> nn.Module:
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.constant_(each.weight, 1 / each.weight[0].numel())
            if each.bias is not None:
                nn.init.zeros_(each.bias)
    return module.eval()


class Residual(nn.Module):
    def __init__(self, c: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(c, c, 3, stride, dilation, dilation)
        self.second = nn.Conv2d(c, c, (3, 5), 1, (1, 2), groups=c)
        self.short = nn.Conv2d(c, c, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


def stack() -> nn.Sequential:
    stem = [nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, Residual(4), Residual(4, 2), nn.AvgPool2d(2), Residual(4, 1, 2))


def support(module: nn.Module, name: str, size: int = 400) -> tuple[int, int]:
    """Rows and columns that the middle of a layer's output depends on, by gradient."""
    kept: dict[str, Tensor] = {}
    handle = module.get_submodule(name).register_forward_hook(lambda _, __, out: kept.update(out=out))
    x = (0.5 + torch.zeros(1, 3, size, size)).requires_grad_()
    module(x)
    handle.remove()
    out = kept["out"]
    (gradient,) = torch.autograd.grad(out[..., out.shape[-2] // 2, out.shape[-1] // 2].sum(), x)
    there = gradient[0].abs().sum(0) > 0
    return int(there.any(1).sum()), int(there.any(0).sum())


def test_the_formula_is_the_support_of_the_gradient():
    module = positive(stack())
    module[2] = nn.AvgPool2d(3, 2, 1)  # a maximum passes its gradient to one place
    found = {each.name: each for each in watch(module, torch.rand(1, 3, 400, 400))}
    assert set(found) == set(convolutions(module))
    for name, each in found.items():
        assert each.field == support(module, name), name
    assert found["6.first"].jump == (16, 16)
    with_maximum = {each.name: each.field for each in watch(stack().eval(), torch.rand(1, 3, 64, 64))}
    assert with_maximum == {name: each.field for name, each in found.items()}


def test_the_fields_of_known_networks():
    resnet = watch(timm.create_model("resnet18").eval(), torch.rand(1, 3, 64, 64))
    assert resnet[-1].field == (435, 435)
    gated = watch(timm.create_model("mobilenetv3_small_050").eval(), torch.rand(1, 3, 64, 64))
    assert {each.field is None for each in gated if ".se." in each.name} == {True}
    assert all(each.field for each in gated if ".se." not in each.name and each.name != "conv_head")


class Mixed(nn.Module):
    """A convolution, channels moved to the end and back, then attention over places, then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.before(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.between(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.after(tokens.transpose(1, 2).reshape(x.shape))


def test_behind_attention_the_field_is_unknown():
    found = {each.name: each.field for each in watch(Mixed(), torch.rand(1, 3, 16, 16))}
    assert found == {"before": (3, 3), "between": (5, 5), "after": None}


def test_sizes_and_multiply_accumulates_are_a_convolutions():
    module = stack().eval()
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        module(torch.rand(1, 3, 96, 96))
    found = watch(module, torch.rand(6, 3, 96, 96))
    assert sum(each.macs for each in found) == counter.get_total_flops() // 2
    assert found[0].map == (48, 48)
    assert [each.activation for each in found[:3]] == ["relu", "relu", ""]


def test_moments_add_up_in_parts():
    x = torch.randn(9, 4, 5, 6, dtype=torch.float64) * torch.tensor([1, 2, 3, 0.0])[:, None, None].double() + 3
    moments = Moments()
    for part in x.split([2, 3, 4]):
        moments.add(part)
    assert moments.deviation.numpy() == pytest.approx(x.float().std((0, 2, 3), correction=0).numpy(), abs=1e-5)
    assert moments.variance == pytest.approx(float(x.var(correction=0)), rel=1e-5)


def test_channels_that_never_change_are_dead_before_and_after_an_activation():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    with torch.no_grad():
        module[0].bias[0], module[0].bias[1] = -100.0, 100.0
        module[2].weight[3] = 0
    found = watch(module, torch.randn(5, 3, 12, 12))
    assert [each.dead() for each in found] == [1, 1]


def deep(scheme: str, layers: int = 21, width: int = 128) -> nn.Sequential:
    made: list[nn.Module] = []
    for _ in range(layers):
        conv = nn.Conv2d(width if made else 3, width, 3, padding=1, padding_mode="circular", bias=False)
        fan = width * 9 if made else 27
        std = math.sqrt(2 / fan) if scheme == "He" else math.sqrt(2 / (fan + width * 9))
        nn.init.normal_(conv.weight, 0, std, generator=torch.Generator().manual_seed(len(made)))
        made += [conv, nn.ReLU()]
    return nn.Sequential(*made).eval().requires_grad_(False)


@pytest.mark.parametrize(("scheme", "ratio"), [("He", 1.0), ("Glorot", 0.5)])
def test_he_keeps_the_variance_through_relus_and_glorot_halves_it(scheme: str, ratio: float):
    module = deep(scheme)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ran = watch(module, x)
    forward = (ran[-1].out.variance / ran[0].out.variance) ** (1 / (len(ran) - 1))
    assert forward == pytest.approx(ratio, rel=0.1)
    back = gradients(module, x, ran).variance
    assert (back[ran[0].name] / back[ran[-1].name]) ** (1 / (len(ran) - 1)) == pytest.approx(ratio, rel=0.1)


def test_gradients_are_those_of_autograd_also_before_changes_in_place():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).requires_grad_(False)
    x = torch.randn(3, 3, 9, 9)
    found = gradients(module, x, watch(module, x), seed=5)
    hidden = module[0](x).requires_grad_()
    answer = module[2](hidden.relu())
    signs = torch.randint(0, 2, answer.shape, generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    (gradient,) = torch.autograd.grad((answer * signs).sum(), hidden)
    assert found.variance["0"] == pytest.approx(float(gradient.square().mean()), rel=1e-5)
    assert found.variance["2"] == pytest.approx(1)


def test_the_radius_is_where_the_energy_lies():
    energy = torch.zeros(21, 21, dtype=torch.float64)
    energy[10, 10], energy[10, 14], energy[2, 10] = 0.9, 0.06, 0.04
    assert radius(energy, (21, 21)) == pytest.approx(4)
    assert radius(energy, (21, 21), 0.99) == pytest.approx(8)
    assert radius(energy, (21, 21), 0.5) == 0
    assert radius(torch.zeros(5, 5), (5, 5)) == 0


def test_wider_kernels_see_farther():
    x = torch.rand(2, 3, 64, 64)
    found = []
    for kernel in (3, 9):
        layers = [nn.Conv2d(3, 8, kernel, padding=kernel // 2), nn.Conv2d(8, 8, kernel, padding=kernel // 2)]
        module = nn.Sequential(*layers).requires_grad_(False)
        found.append(gradients(module, x, watch(module, x)).radius["1"])
    assert 0 < found[0] < 3 < found[1] < 12


def test_lsuv_brings_every_output_to_variance_one_on_a_copy():
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, groups=4), nn.Tanh(), nn.Conv2d(16, 8, 3)
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = 7 * torch.rand(6, 3, 20, 20)
    made, reached = lsuv(module, x)
    assert list(reached) == ["0", "2", "4"]
    for name in reached:
        kept: list[Tensor] = []
        handle = made.get_submodule(name).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.clone()))
        made(x)
        handle.remove()
        assert abs(float(kept[0].detach().var(correction=0)) - 1) < 0.05
        assert reached[name] == pytest.approx(float(kept[0].detach().var(correction=0)), rel=1e-3)
    rows = made[4].weight.detach().flatten(1)
    gram = rows @ rows.T
    assert (gram / gram.diagonal().mean() - torch.eye(8)).abs().max() < 1e-4
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert hooks(made) == hooks(module) == 0
    with pytest.raises(DataError, match="layer '0' answers with variance 0"):
        lsuv(module, torch.zeros(2, 3, 20, 20))


def test_nothing_to_audit_and_nothing_left_behind():
    with pytest.raises(BackboneError, match=r"Linear has no nn\.Conv2d: there is nothing to audit"):
        watch(nn.Linear(3, 3), torch.rand(1, 3))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(7, 7), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        watch(module, torch.rand(1, 3, 9, 9))
    assert hooks(module) == 0
    x = torch.rand(1, 3, 9, 9)
    kept = x.clone()
    watch(module[:2], x)
    assert torch.equal(x, kept)
