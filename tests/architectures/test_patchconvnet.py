import math

import pytest
import timm
import torch
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.patchconvnet import AggregationPool, PatchConvBlock, attention_maps, attention_pool
from foveal.core.errors import BackboneError

TINY = ("patchconvnet_s60", {"embed_dim": 32, "depth": 4})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def small(name: str = TINY[0], **more):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 3, **TINY[1], **more}).eval()


def naive_pool(pool: AggregationPool, x: Tensor) -> Tensor:
    """One image after another, one patch after another."""
    width = x.shape[1]
    out = []
    for image in x:
        patches = [pool.norm1(image[:, i, j]) for i in range(x.shape[2]) for j in range(x.shape[3])]
        tokens = []
        for c in pool.cls_token[0]:
            u = pool.norm1(c)
            read = patches if pool.classes is not None else [u, *patches]
            scores = torch.stack([pool.q(u) @ pool.k(each) for each in read]) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            c = c + pool.ls1.gamma * pool.proj(sum(w * pool.v(each) for w, each in zip(weights, read, strict=True)))
            tokens.append(pool.norm(c + pool.ls2.gamma * pool.mlp(pool.norm2(c))))
        out.append(torch.stack(tokens))
    stacked = torch.stack(out)
    return stacked[:, 0] if pool.classes is None else stacked


@pytest.mark.parametrize("classes", [None, 3])
def test_the_pool_is_the_naive_one_gradients_too(classes: int | None):
    torch.manual_seed(0)
    pool = AggregationPool(8, classes, init_values=1.0)
    found = []
    for run in (pool, lambda x: naive_pool(pool, x)):
        torch.manual_seed(1)
        x = (3 * torch.randn(2, 8, 2, 3)).requires_grad_()
        pool.zero_grad()
        y = run(x)
        y.mul(torch.arange(8.0)).sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in pool.parameters()]])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-4)


def test_the_block_is_the_naive_one():
    torch.manual_seed(0)
    block = PatchConvBlock(16, init_values=0.5)
    x = torch.randn(2, 16, 3, 4)
    first, _, depthwise, _, squeeze, last = block.mix
    h = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (16,), block.norm.weight, block.norm.bias, 1e-6)
    h = nn.functional.gelu(h @ first.weight[:, :, 0, 0].T + first.bias).permute(0, 3, 1, 2)
    padded = nn.functional.pad(h, (1, 1, 1, 1))
    moved = sum(
        padded[:, :, i : i + 3, j : j + 4] * depthwise.weight[None, :, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    )
    h = nn.functional.gelu(moved + depthwise.bias[:, None, None])
    mean = h.mean((2, 3))
    gate = torch.relu(mean @ squeeze.fc1.weight[:, :, 0, 0].T + squeeze.fc1.bias)
    gate = (gate @ squeeze.fc2.weight[:, :, 0, 0].T + squeeze.fc2.bias).sigmoid()
    h = (h * gate[:, :, None, None]).permute(0, 2, 3, 1) @ last.weight[:, :, 0, 0].T + last.bias
    close(block(x), x + 0.5 * h.permute(0, 3, 1, 2))


def test_weights_sum_to_one_and_follow_their_image():
    model = small()
    x = torch.randn(3, 3, 48, 32)
    features = model.forward_features(x)
    weights = model.head.pool.attend(features)[2]
    assert weights.shape == (3, 1, 1 + 6)
    close(weights.sum(-1), torch.ones(3, 1))
    maps = attention_maps(model, x)
    assert maps.shape == (3, 3, 2)
    close(maps.flatten(1), weights[:, 0, 1:])
    close(attention_maps(model, x[[2, 0, 1]]), maps[[2, 0, 1]])
    assert (maps.sum((1, 2)) < 1).all()


@pytest.mark.parametrize("size", [(224, 160), (225, 17)])
def test_oblong_images_and_the_grid(size: tuple[int, int]):
    model = small()
    x = torch.randn(1, 3, *size)
    assert model.forward_features(x).shape == (1, 32, math.ceil(size[0] / 16), math.ceil(size[1] / 16))
    assert model(x).shape == (1, 3)


@pytest.mark.parametrize("init_values", [1e-4, 1e-6])
def test_at_the_start_the_trunk_hardly_changes_the_stem(init_values: float):
    model = small(depth=60, init_values=init_values)
    stem = model.stem(torch.randn(1, 3, 64, 64))
    assert (model.stages(stem) - stem).norm() < 1e-2 * stem.norm()


def test_without_layer_scale_the_pool_is_its_token():
    torch.manual_seed(0)
    pool = AggregationPool(8, init_values=1.0)
    pool.ls1.gamma.data.zero_()
    pool.ls2.gamma.data.zero_()
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    y = pool(x)
    close(y, pool.norm(pool.cls_token[:, 0]).expand(2, -1))
    y.square().sum().backward()
    assert not x.grad.any()


def test_a_query_of_zero_takes_the_mean():
    torch.manual_seed(0)
    pool = AggregationPool(8, init_values=1.0)
    pool.q.weight.data.zero_()
    pool.ls2.gamma.data.zero_()
    x = torch.randn(2, 8, 3, 3)
    read = torch.cat([pool.cls_token.expand(2, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    mean = pool.v(pool.norm1(read)).mean(1)
    close(pool(x), pool.norm(pool.cls_token[:, 0] + pool.proj(mean)))


def test_a_map_for_every_class():
    model = small("patchconvnet_s60_multi")
    x = torch.randn(2, 3, 48, 48)
    vectors = model.forward_head(model.forward_features(x), pre_logits=True)
    assert vectors.shape == (2, 3, 32)
    close(model(x)[:, 1], vectors[:, 1] @ model.head.fc.weight[1] + model.head.fc.bias[1])
    maps = torch.stack([attention_maps(model, x, target) for target in range(3)], 1)
    close(maps.sum((2, 3)), torch.ones(2, 3))
    model.head.pool.cls_token.data[:, 2] *= 30
    moved = torch.stack([attention_maps(model, x, target) for target in range(3)], 1)
    assert [torch.equal(maps[:, i], moved[:, i]) for i in range(3)] == [True, True, False]
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext", "test_vit"])
def test_attention_pool_on_other_networks(name: str):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if name == "test_vit":
        with pytest.raises(BackboneError, match="has 0 layers that pool a map"):
            attention_pool(model)
        return
    pooled = attention_pool(model)
    x = torch.randn(2, 3, 96, 64)
    assert pooled(x).shape == (2, 3)
    assert attention_maps(pooled, x).shape == (2, *model.forward_features(x).shape[-2:])
    assert pooled.state_dict().keys() > before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(each, AggregationPool) for each in model.modules())


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match=r"embed_dim 30: .* multiple of 8"):
        small(embed_dim=30)
    with pytest.raises(BackboneError, match="12x64 pixels: PatchConvNet needs at least 16x16"):
        small()(torch.zeros(1, 3, 12, 64))
    with pytest.raises(BackboneError, match=r"class 2 of a single-token model: .* train the multi-class variant"):
        attention_maps(small(), torch.zeros(1, 3, 32, 32), 2)
    with pytest.raises(BackboneError, match="target 3: the model has maps for the classes 0 to 2"):
        attention_maps(small("patchconvnet_s60_multi"), torch.zeros(1, 3, 32, 32), 3)
    with pytest.raises(BackboneError, match="1 layers that pool a map, switched off"):
        attention_pool(timm.create_model("test_resnet", num_classes=0, global_pool=""))
    with pytest.raises(BackboneError, match="global_pool 'max'"):
        small(global_pool="max")
