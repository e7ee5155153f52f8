"""The model that explanations and attacks look at, and the layer recorder."""

import pytest
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, Plan, build, load_backbone
from foveal.backbones.recorder import find, recording
from foveal.backbones.wrapper import OpenModel, Scorer, as_map, frozen
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing

PLAN = Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def test_it_normalises_and_the_neutral_colour_becomes_zero():
    seen: list[Tensor] = []
    module = net()
    model = OpenModel(module, PLAN, answer=lambda x: seen.append(x) or module(x))
    x = images()
    model(x)
    expected = (x - torch.tensor(PLAN.mean)[:, None, None]) / torch.tensor(PLAN.std)[:, None, None]
    assert torch.allclose(seen[0], expected)
    model(model.neutral.expand(1, 3, 16, 16))
    assert seen[1].abs().max() < 1e-6


def test_the_network_never_sees_more_than_a_batch_at_once():
    sizes: list[int] = []
    module = net()
    model = OpenModel(module, PLAN, answer=lambda x: sizes.append(len(x)) or module(x), batch=2)
    assert torch.allclose(model(images()), OpenModel(module, PLAN)(images()), atol=1e-6)
    assert sizes == [2, 2, 1]


def test_gradients_flow_to_the_images_and_to_nothing_else():
    module = net()
    module.head.bias.requires_grad_(False)
    before = [each.requires_grad for each in module.parameters()]
    x = images().requires_grad_()
    OpenModel(module, PLAN).of(x, torch.tensor([0, 1, 2, 0, 1])).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(each.grad is None for each in module.parameters())
    assert [each.requires_grad for each in module.parameters()] == before


def test_parameters_are_as_before_also_after_an_error():
    module = net()
    with pytest.raises(ZeroDivisionError), frozen(module):
        assert not any(each.requires_grad for each in module.parameters())
        raise ZeroDivisionError
    assert all(each.requires_grad for each in module.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images() * 255, "from .* to 255, expected 0 to 1: divide by 255|expected 0 to 1: divide by 255"),
        ((images() - 0.5) / 0.2, "look normalised"),
        (images() * 1.5, "expected 0 to 1: clip them"),
        (images() - 0.1, "expected 0 to 1: clip them"),
        ((images() * 255).byte(), "uint8: expected float in .* divide by 255"),
        (images().where(images() < 0.9, torch.nan), "NaN"),
        (images()[0], "expected a tensor .B, 3, H, W"),
        (images()[:, :1], "expected a tensor .B, 3, H, W"),
        (images()[:0], "no images"),
        ("cat.png", "came as str"),
    ],
    ids=["0-255", "normalised", "bright", "dark", "bytes", "nan", "one", "grey", "empty", "path"],
)
def test_images_of_another_range_or_shape_are_told_what_they_are(given: object, message: str):
    with pytest.raises(DataError, match=message):
        OpenModel(net(), PLAN)(given)  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_refused_also_when_it_changes_later():
    with pytest.raises(UsageError, match=r"Net is in training mode.*\.eval\(\)"):
        OpenModel(net().train(), PLAN)
    module = net()
    model = OpenModel(module, PLAN)
    module.body[1].train()
    with pytest.raises(UsageError, match="training mode"):
        model(images())


def test_answers_that_are_no_scores_are_refused():
    with pytest.raises(UsageError, match=r"answered \(5, 4, 14, 14\) for 5 images: expected scores"):
        OpenModel(net(), PLAN, answer=net().body)(images())
    with pytest.raises(UsageError, match="NaN"):
        Scorer(lambda x: x.new_full((len(x), 2), torch.nan))(images())
    scorer = Scorer(lambda x: x.mean((2, 3)))
    assert torch.equal(scorer.of(images(), torch.full((5,), 2)), images().mean((2, 3))[:, 2])
    for wrong in (3, -1):
        with pytest.raises(UsageError, match=f"target {wrong}: the model has 3 classes, 0 to 2"):
            scorer.of(images(), torch.full((5,), wrong))


def test_recorded_outputs_are_the_layers_and_the_hooks_go():
    module = net()
    with recording(module, ["body.0", "body"]) as seen:
        module(images())
    assert torch.equal(seen["body.0"], module.body[0](images()))
    assert not seen["body"].requires_grad
    assert hooks(module) == 0
    with recording(module, ["body"], graph=True) as seen:
        module(images())
    assert seen["body"].requires_grad


def test_hooks_go_when_the_network_or_the_caller_fails():
    module = net()
    with pytest.raises(RuntimeError), recording(module, ["body", "head"]):
        module(torch.zeros(1, 7, 16, 16))
    assert hooks(module) == 0
    with (
        pytest.raises(UsageError, match=r"no layer 'body\.9': 'body' has 0, 1, 2"),
        recording(module, ["head", "body.9"]),
    ):
        pass
    assert hooks(module) == 0
    with pytest.raises(UsageError, match="no layer 'neck': there are body, head"):
        find(module, "neck")


def opened(name: str, size: int, **args: object) -> OpenModel:
    torch.manual_seed(0)
    if args:
        plan = Plan(name, name, {"img_size": size, **args}, Preprocessing(size, (0.5,) * 3, (0.5,) * 3), 32, "random")
        backbone = Backbone(plan, build(plan))
    else:
        backbone = load_backbone(name, pretrained=False, size=size)
    return OpenModel(Classifier(backbone, nn.Linear(backbone.width, 3)).eval(), backbone.preprocessing)


SWIN = {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}


@pytest.mark.parametrize(
    ("model", "layer", "shape"),
    [
        (opened("test_vit", 64), "", (64, 4, 4)),
        (opened("test_vit", 64), "blocks.1", (64, 4, 4)),
        (opened("swin_tiny_patch4_window7_224", 64, **SWIN), "", (32, 8, 8)),
        (opened("swin_tiny_patch4_window7_224", 64, **SWIN), "layers.0", (16, 16, 16)),
        (opened("test_efficientnet", 64), "blocks.0", (16, 32, 32)),
        (opened("test_efficientnet", 64), "backbone.model.conv_stem", (24, 32, 32)),
        (opened("test_coatnet", 64), "", (128, 2, 2)),
    ],
    ids=["vit", "vit block", "swin", "swin stage", "cnn stage", "cnn full name", "hybrid"],
)
def test_feature_maps_have_channels_first_and_the_grid_of_the_image(
    model: OpenModel, layer: str, shape: tuple[int, ...]
):
    x = torch.rand(2, 3, 64, 64)
    maps = model.feature_map(x, layer)
    assert maps.shape == (2, *shape)
    changed = x.clone()
    changed[:, :, :8, :8] = 1 - changed[:, :, :8, :8]
    moved = (model.feature_map(changed, layer) - maps).norm(dim=1)[0]
    if layer:  # near the input, a change in a corner shows in that corner
        half = shape[1] // 2
        assert moved[:half, :half].mean() > 2 * max(moved[half:].mean(), moved[:half, half:].mean())
    assert hooks(model.module) == 0


def test_tokens_without_a_grid_are_refused():
    with pytest.raises(BackboneError, match="11 tokens, which form no square grid"):
        as_map(torch.zeros(1, 11, 4), "x", (64, 64), None)
    assert as_map(torch.zeros(1, 17, 4), "x", (64, 64), None).shape == (1, 4, 4, 4)
    with pytest.raises(UsageError, match="answers list"):
        as_map([1], "x", (64, 64), None)
    hiera = opened("hiera_tiny_224", 224)
    with pytest.raises(BackboneError, match="not in reading order"):
        hiera.feature_map(torch.rand(1, 3, 224, 224))
