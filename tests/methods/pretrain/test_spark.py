"""spark: sizes of its parts, masks, the loss, and what a trained network keeps."""

import copy

import pytest
import torch
from tests.contract.capabilities import hooks
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.core.errors import BackboneError, UsageError
from foveal.methods.pretrain.spark import (
    Decoder,
    Densify,
    MaskedAutoencoder,
    Options,
    Spark,
    cells_of,
    hidden_mean,
    kept_cells,
    random_cells,
    targets,
)  # fmt: skip

LIGHT = Options(decoder_width=32, epochs=1, batch_size=4)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def backbone(name: str = "test_resnet") -> Backbone:
    torch.manual_seed(0)
    return load_backbone(name, pretrained=False, size=64)


def views(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "parameters"), [(768, 23_183_115), (512, 10_304_947)])
def test_parameters_of_the_decoder(width: int, parameters: int):
    with torch.device("meta"):
        assert count(Decoder(32, width)) == parameters


@pytest.mark.parametrize(
    ("channels", "parameters"), [((2048, 1024, 512, 256), 6_230_688), ((512, 256, 128, 64), 1_558_752)]
)
def test_parameters_between_a_resnet_and_the_decoder(channels: tuple[int, ...], parameters: int):
    with torch.device("meta"):
        parts = [Densify(each, 768 >> j, "batch", j == 0) for j, each in enumerate(channels)]
    assert sum(map(count, parts)) == parameters


def test_equal_widths_need_no_projection():
    assert isinstance(Densify(768, 768, "layer", True).project, nn.Identity)
    assert isinstance(Densify(384, 384, "layer", False).project, nn.Conv2d)


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75])
@pytest.mark.parametrize("side", range(2, 13))
def test_how_many_cells_stay(side: int, ratio: float):
    torch.manual_seed(side)
    active = random_cells(16, side, ratio)
    assert active.shape == (16, 1, side, side)
    assert (active.flatten(1).sum(1) == round(side * side * (1 - ratio))).all()
    assert side == 2 or len(active.flatten(1).unique(dim=0)) > 1, "every image has the same mask"


def test_of_49_cells_20_stay():
    assert kept_cells(49, 0.6) == 20


def test_every_cell_is_hidden_about_as_often():
    torch.manual_seed(0)
    share = random_cells(4000, 3, 0.6).float().mean(0)
    assert (share - 4 / 9).abs().max() < 0.04


def naive_loss(painted: Tensor, images: Tensor, active: Tensor, stride: int) -> Tensor:
    """Cell by cell, as the paper tells it."""
    errors = []
    for b, _, i, j in (~active).nonzero().tolist():
        box = (slice(i * stride, (i + 1) * stride), slice(j * stride, (j + 1) * stride))
        goal = images[b, :, box[0], box[1]]
        goal = (goal - goal.mean()) / (goal.var(unbiased=True) + 1e-6).sqrt()
        errors.append((painted[b, :, box[0], box[1]] - goal).square().mean())
    return torch.stack(errors).mean()


def test_the_loss_is_that_of_hidden_cells_alone():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    painted = torch.randn(3, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    active = torch.rand(3, 1, 2, 3) < 0.4
    loss = hidden_mean((cells_of(painted, 8) - targets(images, 8)).square(), active)
    expected = naive_loss(painted, images, active, 8)
    assert torch.allclose(loss, expected, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, painted)[0] for each in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-14)
    seen = active.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(painted)
    assert (ours[seen] == 0).all()
    assert (ours[~seen] != 0).all()


def test_a_blank_answer_scores_one():
    goal = targets(torch.randn(2, 3, 64, 64), 32)
    assert float(goal.square().mean()) == pytest.approx(1, abs=1e-3)
    assert targets(torch.ones(1, 3, 32, 32), 32).abs().max() == 0  # one colour: nothing to paint


def test_what_is_hidden_changes_the_target_alone():
    model = Spark(LIGHT).attach(backbone()).eval()
    torch.manual_seed(1)
    active = random_cells(4, 2, 0.6)
    first = views()[:, 0]
    seen = active.repeat_interleave(32, 2).repeat_interleave(32, 3)
    second = torch.where(seen, first, views(seed=3)[:, 0])
    with torch.no_grad():
        assert torch.equal(model(first, active), model(second, active))
    assert not torch.equal(targets(first, 32), targets(second, 32))


def test_densify_fills_hidden_cells_with_its_token():
    torch.manual_seed(0)
    part = Densify(8, 8, "batch", True).train()
    active = random_cells(4, 2, 0.6)
    seen = active.repeat_interleave(3, 2).repeat_interleave(3, 3)
    maps = torch.randn(4, 8, 6, 6) * seen
    out = part(maps, active).permute(0, 2, 3, 1)
    rows = maps.permute(0, 2, 3, 1)[seen[:, 0]]
    expected = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + part.norm.eps).sqrt()
    assert torch.allclose(out[seen[:, 0]], expected, atol=1e-5)
    assert torch.equal(out[~seen[:, 0]], part.token.view(1, -1).expand_as(out[~seen[:, 0]]))
    assert 0 < float(part.token.detach().std()) < 0.05


def test_the_decoder_adds_each_scale_where_it_belongs():
    torch.manual_seed(0)
    decoder = Decoder(32, 64).eval()
    maps = [torch.randn(2, 64 >> j, 2 << j, 2 << j) for j in range(4)]
    x = maps[0]
    for level, up in enumerate(decoder.ups):
        for layer in up:
            x = layer(x)
        if level < 3:
            x = x + maps[level + 1]
    with torch.no_grad():
        assert torch.allclose(decoder(maps), decoder.paint(x))
        assert decoder(maps).shape == (2, 3, 64, 64)
        assert decoder(maps[:1]).shape == (2, 3, 64, 64)
        assert not torch.equal(decoder(maps[:1]), decoder(maps))


def test_a_step_trains_every_part_that_the_maps_need():
    method = Spark(LIGHT)
    net = load_backbone("test_efficientnet", pretrained=False, size=64)
    model = method.attach(net).train()
    torch.manual_seed(0)
    parts = method.loss(model, {"views": views()})
    parts["loss"].backward()
    assert not parts["blank"].requires_grad
    still = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert still == {"backbone.model.conv_head.weight", "backbone.model.bn2.weight", "backbone.model.bn2.bias"}
    for name, each in model.named_parameters():
        assert (each.grad is None) == (name in still), name
    assert all(each.requires_grad for each in method.finish(model).parameters())


def test_the_trained_network_is_the_plain_one():
    net = backbone()
    method, model = Spark(LIGHT), Spark(LIGHT).attach(net).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        torch.manual_seed(seed)
        method.loss(model, {"views": views(seed=seed)})["loss"].backward()
        optimizer.step()
    better = method.finish(model).eval()
    plain = backbone()
    before = copy.deepcopy(plain.state_dict())
    plain.model.load_state_dict(better.model.state_dict(), strict=True)
    assert any(not torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    with torch.no_grad():
        for batch in (5, 2):  # no mask is left behind
            x = views(batch)[:, 0]
            assert torch.equal(better(x), plain.eval()(x))
    assert hooks(better) == 0


def test_pictures_keep_what_was_seen_and_paint_the_rest():
    method = Spark(LIGHT)
    model = method.attach(backbone()).eval()
    images = views()[:, 0]
    torch.manual_seed(0)
    with torch.no_grad():
        shown = method.pictures(model, images)
    saw, painted = shown.values()
    seen = saw != 0
    assert 0.4 < float(seen.float().mean()) < 0.6
    assert torch.equal(painted[seen], images[seen])
    assert torch.isfinite(painted).all()
    assert (painted[~seen] != images[~seen]).float().mean() > 0.9


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_a_ratio_outside_of_0_and_1(ratio: float):
    with pytest.raises(ValueError, match="ratio"):
        Options(ratio=ratio)


@pytest.mark.parametrize(("ratio", "kept"), [(0.9, 0), (0.1, 4)])
def test_a_ratio_that_leaves_nothing_to_see_or_nothing_to_paint(ratio: float, kept: int):
    with pytest.raises(UsageError, match=rf"a ratio of {ratio} leaves {kept} of 4 cells active"):
        Spark(Options(ratio=ratio, decoder_width=32)).attach(backbone())


def test_a_decoder_that_cannot_be_halved():
    with pytest.raises(UsageError, match="decoder_width=100: expected a multiple of 32"):
        MaskedAutoencoder(backbone(), 100, 4)


def test_images_that_are_no_multiple_of_the_stride():
    net = load_backbone("test_resnet", pretrained=False, size=80)
    with pytest.raises(UsageError, match="80 is not a multiple of 32"):
        Spark(LIGHT).attach(net)


def test_a_transformer():
    with pytest.raises(BackboneError, match=r"test_vit \(vit\) is not a network of convolutions alone"):
        Spark(LIGHT).attach(load_backbone("test_vit", pretrained=False))
