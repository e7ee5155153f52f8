"""Masked networks: equal to a naive sparse network, blind to what is hidden, and as before once the block ends."""

import copy
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from tests.contract.capabilities import hooks
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.backbones.masked import masked, pyramid, repeated
from foveal.core.errors import BackboneError, UsageError

NETS = (
    "test_resnet",
    "tf_efficientnet_lite0",
    "efficientnet_lite0",
    "test_efficientnet",
    "test_convnext",
    "mobilenetv3_small_050",
)
"""Plain, with padded and fused layers, with rows and layer norms, with gates (SE), with sigmoids in those."""
SIZE = 64


@pytest.fixture(scope="module")
def nets() -> dict[str, Backbone]:
    torch.manual_seed(0)
    found = {name: load_backbone(name, pretrained=False, size=SIZE) for name in NETS}
    for net in found.values():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # statistics that matter
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.bias, std=0.5)
            if hasattr(module, "gamma") and isinstance(module.gamma, nn.Parameter):  # ConvNeXt's nearly silent branches
                nn.init.constant_(module.gamma, 0.5)
    return found


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def cells(count: int = 3, seed: int = 1) -> Tensor:
    """As many active cells in every image, at places of its own."""
    order = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < 2).view(count, 1, 2, 2)


def maps(net: Backbone, x: Tensor, active: Tensor) -> list[Tensor]:
    with masked(net, active):
        return [each for each, _ in net.feature_map(x * repeated(active, *x.shape[2:]))][-4:]


class Tiny(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.act = nn.Sigmoid()
        self.rows = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        return self.rows(self.act(self.deep(x)).permute(0, 2, 3, 1))


def naive(net: Tiny, x: Tensor, active: Tensor) -> Tensor:
    """The same place by place: every layer is computed at active places only, from what is active."""

    def spread(places: list[tuple[int, int, int]], rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        out = torch.zeros(shape, dtype=rows.dtype)
        return out.index_put(tuple(torch.tensor(axis) for axis in zip(*places, strict=True)), rows)

    def convolved(x: Tensor, conv: nn.Conv2d, places: list[tuple[int, int, int]]) -> Tensor:
        padded = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1))
        stride, size = conv.stride[0], conv.out_channels // conv.groups
        rows = []
        for b, i, j in places:
            window = padded[b, :, i * stride : i * stride + 3, j * stride : j * stride + 3]
            parts = window.chunk(conv.groups)
            assert conv.bias is not None
            rows.append(
                torch.cat([
                    torch.stack([(parts[g] * conv.weight[g * size + c]).sum() for c in range(size)])
                    for g in range(conv.groups)
                ]) + conv.bias
            )  # fmt: skip
        return torch.stack(rows)

    def places(factor: int) -> list[tuple[int, int, int]]:
        B, _, f, g = active.shape
        side = range(f * factor), range(g * factor)
        return [(b, i, j) for b in range(B) for i in side[0] for j in side[1] if active[b, 0, i // factor, j // factor]]

    B, (f, g) = len(x), active.shape[2:]
    x = x.permute(0, 2, 3, 1) * repeated(active, *x.shape[2:])[:, 0, :, :, None]
    wide, deep = places(2), places(1)
    rows = convolved(x, net.stem, wide)
    mean, var = rows.mean(0), rows.var(0, unbiased=False)
    rows = ((rows - mean) / (var + net.norm.eps).sqrt() * net.norm.weight + net.norm.bias).relu()
    x = spread(wide, rows, (B, 2 * f, 2 * g, 8))
    padded = F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1), value=-torch.inf)
    rows = torch.stack([padded[b, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((1, 2)) for b, i, j in deep])
    rows = convolved(spread(deep, rows, (B, f, g, 8)), net.deep, deep).sigmoid()
    return spread(deep, rows @ net.rows.weight.T + net.rows.bias, (B, f, g, 5))


def test_it_agrees_with_a_network_computed_place_by_place():
    torch.manual_seed(0)
    net = Tiny().double().train()
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    active = torch.rand(2, 1, 3, 2) < 0.5
    weights = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    gradients = []
    for answer in (naive, None):
        net.zero_grad()
        if answer is None:
            with masked(net, active):
                out = net(x * repeated(active, 12, 8))
        else:
            out = answer(net, x, active)
        (out * weights).sum().backward()
        gradients.append([out.detach(), *(p.grad for p in net.parameters())])
    for theirs, ours in zip(*gradients, strict=True):
        assert ours is not None
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_with_all_cells_active_it_is_the_dense_network(nets: dict[str, Backbone], name: str):
    everything = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    for training, x, close in ((False, images(), 1e-5), (True, images().double(), 1e-9)):
        dense, sparse = (copy.deepcopy(nets[name]).to(x.dtype).train(training) for _ in range(2))
        with torch.no_grad():
            expected = [each for each, _ in dense.feature_map(x)][-4:]
            found = maps(sparse, x, everything)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=close * max(1.0, float(theirs.abs().max())))
        for (key, ours), theirs in zip(sparse.state_dict().items(), dense.state_dict().values(), strict=True):
            assert torch.allclose(ours, theirs, atol=close), key


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_hidden_cells_stay_empty_at_every_scale(nets: dict[str, Backbone], name: str, training: bool):
    net, x, active = copy.deepcopy(nets[name]).train(training), images(), cells()
    with torch.no_grad():
        found = maps(net, x, active)
        dense = [each for each, _ in net.feature_map(x * repeated(active, SIZE, SIZE))][-4:]
    for ours, naive_ in zip(found, dense, strict=True):
        seen = repeated(active, *ours.shape[2:]).expand_as(ours)
        assert (ours[~seen] == 0).all()
        assert (ours.abs().amax(1) > 0).float().mean() <= active.float().mean()
        assert (ours[seen] != 0).any()
        assert (naive_ == 0).float().mean() < (ours == 0).float().mean(), "a dense network does not forget the mask"


@pytest.mark.parametrize("name", NETS)
def test_what_is_hidden_changes_nothing(nets: dict[str, Backbone], name: str):
    active, first = cells(), images()
    second = torch.where(repeated(active, SIZE, SIZE), first, images(seed=5))
    assert not torch.equal(first, second)
    results = []
    for x in (first, second):
        net = copy.deepcopy(nets[name]).train()
        with torch.no_grad():
            results.append([*maps(net, x, active), *net.state_dict().values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_gate_reads_the_mean_of_active_places(nets: dict[str, Backbone]):
    from timm.layers.squeeze_excite import SEModule

    torch.manual_seed(3)
    gate, x, active = SEModule(8, rd_channels=4), torch.randn(3, 8, 4, 4), cells()
    x = x * repeated(active, 4, 4)
    with masked(gate, active):
        ours = gate(x)
    for b in range(3):
        rows = x[b, :, repeated(active, 4, 4)[b, 0]]  # [8, active places]
        squeezed = gate.fc2(gate.act(gate.fc1(rows.mean(1)[None, :, None, None]))).sigmoid()
        assert torch.allclose(ours[b], x[b] * squeezed[0], atol=1e-6)


def test_the_layers_of_lite0_that_a_conversion_by_exact_type_would_miss():
    for name, padded in (("efficientnet_lite0", 0), ("tf_efficientnet_lite0", 5)):
        with torch.device("meta"):
            net = load_backbone(name, pretrained=False)
        kinds = Counter(type(module).__name__ for module in net.modules())
        assert kinds["Conv2d"] + kinds["Conv2dSame"] == 48 + 1
        assert kinds["Conv2dSame"] == padded
        assert kinds["BatchNormAct2d"] == 48 + 1
    net = load_backbone("tf_efficientnet_lite0", pretrained=False)
    found = pyramid(net, 64)
    assert (found.channels, found.strides, found.norm) == ((24, 40, 112, 320), (4, 8, 16, 32), "batch")
    assert [name.split(".")[1] for name in found.idle] == ["conv_head", "bn2", "bn2"]


def test_nothing_is_left_after_the_block_and_after_a_crash(nets: dict[str, Backbone]):
    net = nets["test_resnet"]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        expected = net.eval()(images(5))
        maps(net, images(3), cells(3))
        with pytest.raises(ArithmeticError), masked(net, cells(2)):
            net.feature_map(images(2))
            raise ArithmeticError
        with pytest.raises(RuntimeError), masked(net, cells(2)):
            net.feature_map(images(3))  # a batch of another size
        assert hooks(net) == 0
        assert torch.equal(net(images(5)), expected)
        assert torch.equal(net(images(5)[:2]), expected[:2]) or torch.allclose(
            net(images(5)[:2]), expected[:2], atol=1e-5
        )
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_blocks_nest_and_the_outer_mask_comes_back(nets: dict[str, Backbone]):
    net, x = nets["test_efficientnet"].eval(), images()
    outer, inner = cells(seed=1), cells(seed=2)
    with torch.no_grad():
        alone = maps(net, x, outer), maps(net, x, inner)
        with masked(net, outer):
            nested = maps(net, x, inner)
            after = [each for each, _ in net.feature_map(x * repeated(outer, SIZE, SIZE))][-4:]
    for ours, theirs in zip([*after, *nested], [*alone[0], *alone[1]], strict=True):
        assert torch.equal(ours, theirs)
    assert hooks(net) == 0


def test_two_threads_have_a_mask_each_on_one_network(nets: dict[str, Backbone]):
    net, x = nets["test_resnet"].eval(), images()
    masks = [cells(seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        alone = [maps(net, x, mask) for mask in masks]
    together: dict[int, list[Tensor]] = {}
    both = threading.Barrier(2)

    def work(which: int) -> None:
        with torch.no_grad(), masked(net, masks[which]):
            both.wait(10)
            together[which] = [each for each, _ in net.feature_map(x * repeated(masks[which], SIZE, SIZE))][-4:]
            both.wait(10)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(together[which], alone[which], strict=True))
    assert hooks(net) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit", "not a network of convolutions alone"),
        ("convmixer_768_32", r"strides \[7, 7, 7, 7\]: expected each twice the one before"),
        ("hgnet_tiny", r"'stages.0.blocks.0.aggregation.1' \(EseModule\) pools the whole map"),
        ("gcresnext26ts", r"'stages.0.0.attn' \(GlobalContext\)"),
    ],
)
def test_networks_that_would_see_through_the_mask_are_refused(name: str, message: str):
    net = load_backbone(name, pretrained=False)
    with pytest.raises(BackboneError, match=message):
        pyramid(net, 64)
    assert hooks(net) == 0
    assert net.training


@pytest.mark.parametrize(("norm", "message"), [("groupnorm", "group norm"), ("instancenorm", "instance norm")])
def test_norms_over_places_are_refused_by_name(norm: str, message: str):
    net = load_backbone("test_resnet", pretrained=False)
    net.model.layer2[0].bn1 = nn.GroupNorm(4, 48) if norm == "groupnorm" else nn.InstanceNorm2d(48)
    with pytest.raises(BackboneError, match=rf"'layer2.0.bn1' \(\w+\) normalises over places \({message}\)"):
        pyramid(net, 64)


def test_sides_that_do_not_divide():
    net = load_backbone("test_resnet", pretrained=False)
    with pytest.raises(UsageError, match="100 is not a multiple of 32, the last stride of test_resnet; use 96"):
        pyramid(net, 100)
    with pytest.raises(BackboneError, match="a map of 7 x 8 cannot be cut into 2 x 2 cells"):
        repeated(cells(1), 7, 8)
