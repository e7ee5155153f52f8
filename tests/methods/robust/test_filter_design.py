"""filter-design: what it reports of planted faults, its pictures, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveal.backbones.wrapper import OpenModel
from foveal.blocks.filter_banks import Bank, install, learn
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.families.robust import Examination
from foveal.core.preprocessing import Preprocessing
from foveal.methods.robust.filter_design import FilterDesign, Options, picture

PLAIN = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Net(nn.Module):
    """Two dense convolutions, a depthwise one and one of 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 5, 2), nn.Conv2d(12, 10, 3)
        self.third, self.fourth = nn.Conv2d(10, 10, (7, 7), padding=3, groups=10), nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).tanh()
        return self.head(self.fourth(self.third(x)).mean((2, 3)))


def images(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def examined(net: nn.Module, x: Tensor | None = None, **given) -> tuple[Examination, dict]:
    found = FilterDesign(Options(patches=2000, **given)).examine(
        OpenModel(net.eval(), PLAIN), images() if x is None else x, 0
    )
    return found, {layer["name"]: layer for layer in found.numbers["layers"]}


def test_sizes_and_numbers_are_those_of_the_layers():
    net = Net()
    found, layers = examined(net)
    assert list(layers) == ["first", "second", "third", "fourth"]
    assert [layers[name]["field"] for name in layers] == [5, 9, 21, 21]
    assert [layers[name]["activation"] for name in layers] == ["relu", "tanh", "", ""]
    assert [layers[name]["recommended"] for name in layers] == ["He", "Glorot", "Glorot", "Glorot"]
    assert layers["first"]["he"] == pytest.approx(float(net.first.weight.std(correction=0)) / (2 / 75) ** 0.5, rel=1e-5)
    assert layers["first"]["stacked"] == 9 * 3 * 12 + 9 * 12 * 12
    assert layers["third"]["stacked"] == 3 * 9 * 10
    assert layers["second"]["stacked"] is None
    assert layers["fourth"]["separability"] is layers["fourth"]["dc"] is layers["fourth"]["radius"] is None
    assert layers["third"]["suggested"] is None
    assert layers["second"]["suggested"] == layers["second"]["rank99"]
    assert found.numbers["weights"] == sum(
        conv.weight.numel() for conv in (net.first, net.second, net.third, net.fourth)
    )
    assert layers["second"]["textures"] == pytest.approx(layers["second"]["radius"] / found.numbers["texture"])
    assert found.good
    assert "Nothing among them asks for a repair" in found.verdict
    with torch.no_grad():
        x = (images() - 0.5) / 0.25
        first = net.first(x)
        second = net.second(first.relu())
    expected = float(second.var(correction=0) / first.var(correction=0))
    assert layers["second"]["forward"] == pytest.approx(expected, rel=1e-4)


def test_planted_faults_are_found():
    net = Net()
    with torch.no_grad():
        net.first.weight[1] = net.first.weight[0]
        net.first.weight[2] = -1.5 * net.first.weight[0] + 0.001
        net.first.bias[5] = -50
        net.third.weight.copy_(torch.ones(10, 1, 7, 1) * torch.randn(10, 1, 1, 7))
    found, layers = examined(net)
    assert (layers["first"]["identical"], layers["first"]["copies"], layers["first"]["dead"]) == (1, 2, 1)
    assert not found.good
    text = " ".join(found.findings)
    assert "1 filters equal another" in text
    assert "1 channels answer the same" in text
    assert "most in first, 1 of 12" in text
    assert "1 layers are nearly outer products" in text
    assert "(third)" in text


def test_the_bank_it_keeps_goes_into_the_first_layer():
    net = Net()
    found, _ = examined(net)
    assert found.tensors["weight"].shape == net.first.weight.shape
    inputs = (images() - 0.5) / 0.25
    with pytest.warns(UserWarning, match="it divides by their mean deviation"):
        conv = install(net.first, learn(inputs, "kmeans", 12, 5, count=2000, seed=0))
    assert torch.equal(conv.weight, found.tensors["weight"])
    assert torch.equal(conv.bias, found.tensors["bias"])
    own, _ = examined(net, bank="dct", filters=20, size=4)
    assert own.tensors["weight"].shape == (20, 3, 4, 4)


def test_constant_images_are_left_out_and_alone_refused():
    some = images()
    some[3] = 0.7
    found, _ = examined(Net(), some)
    assert found.numbers["images"] == len(some) - 1
    with pytest.raises(DataError, match="all 4 images are constant: zero variance"):
        examined(Net(), torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32))


def test_what_is_refused():
    with pytest.raises(BackboneError, match=r"Sequential has no nn\.Conv2d: there is nothing to audit"):
        examined(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)))
    with pytest.raises(DataError, match="covariance needs at least"):
        examined(Net(), images(2), size=20)
    with pytest.raises(UsageError, match="80 pca filters of 75 numbers: there are only 75 directions"):
        examined(Net(), bank="pca", filters=80)


def test_pictures_show_the_filters():
    bank = torch.zeros(3, 3, 2, 2)
    bank[1, 0] = 2.0
    bank[2, :, 0, 0] = -1.0
    drawn = picture(bank)
    side = 2 * 18 + 2
    assert drawn.shape == (side, 3 * side, 3)
    assert drawn[5, 5].tolist() == [128, 128, 128]
    assert drawn[5, side + 5].tolist() == [255, 128, 128]
    assert drawn[5, 2 * side + 5].tolist() == [0, 0, 0]
    assert drawn[0, 0].tolist() == [255, 255, 255]
    pattern = torch.tensor([[0.0, 1.0], [0.5, -1.0]])
    deep = torch.tensor([1.0, 2.0, -0.5, 1.0])[None, :, None, None] * pattern
    grey = picture(deep)[1::18, 1::18, 0][:2, :2].astype(float)
    assert np.abs(grey - (127.5 + 127.5 * pattern.numpy())).max() < 1


def test_a_bank_names_what_it_is():
    bank = learn(images(), "gabor", 8, 5)
    assert isinstance(bank, Bank)
    assert bank.whitening is None
    assert bank.contrast == 0
