import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, ParallelThingsBlock
from torch import Tensor, nn

from foveal.architectures.three_things_vit import HMlpStem, merge_branches, parallelize
from foveal.core.errors import BackboneError
from foveal.evaluate.cost import counted

TINY = ("vit_small_patch16_hmlp_224", {"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 2})


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter and every running statistic random, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.5)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def vit(depth: int = 4, **more) -> nn.Module:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 3, "init_values": 0.1}
    return noisy(timm.create_model("vit_tiny_patch16_224", **{**shape, "depth": depth, **more}))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def attention(part, x: Tensor) -> Tensor:
    """A branch of attention head by head, from its weights alone."""
    a, d = part.attn, x.shape[-1]
    y = F.layer_norm(x, (d,), part.norm.weight, part.norm.bias, part.norm.eps)
    q, k, v = (y @ a.qkv.weight.T + a.qkv.bias).chunk(3, -1)
    heads = [slice(h * a.head_dim, (h + 1) * a.head_dim) for h in range(a.num_heads)]
    mixed = [((q[..., h] @ k[..., h].mT) / a.head_dim**0.5).softmax(-1) @ v[..., h] for h in heads]
    return part.ls.gamma * (torch.cat(mixed, -1) @ a.proj.weight.T + a.proj.bias)


def mlp(part, x: Tensor) -> Tensor:
    y = F.layer_norm(x, (x.shape[-1],), part.norm.weight, part.norm.bias, part.norm.eps)
    y = F.gelu(y @ part.mlp.fc1.weight.T + part.mlp.fc1.bias) @ part.mlp.fc2.weight.T + part.mlp.fc2.bias
    return part.ls.gamma * y


class Part:
    """A block's half, by the names that timm's parallel block gives it."""

    def __init__(self, **parts) -> None:
        self.__dict__.update(parts)


def naive(model: nn.Module, x: Tensor, k: int) -> Tensor:
    """The paper's formula on the blocks of a sequential ViT, k at a time."""
    x = model._pos_embed(model.patch_embed(x))
    for start in range(0, len(model.blocks), k):
        group = model.blocks[start : start + k]
        x = x + sum(attention(Part(norm=b.norm1, attn=b.attn, ls=b.ls1), x) for b in group)
        x = x + sum(mlp(Part(norm=b.norm2, mlp=b.mlp, ls=b.ls2), x) for b in group)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("k", [2, 4])
def test_parallel_blocks_are_the_formula_gradients_too(k: int):
    plain = vit()
    made = parallelize(plain, k)
    found = []
    for model, run in ((made, made), (plain, lambda x: naive(plain, x, k))):
        x = images().requires_grad_()
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *sorted((p.grad.flatten() for p in model.parameters()), key=order)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def order(tensor: Tensor) -> tuple[float, ...]:
    return (len(tensor), round(float(tensor.sum()), 2), round(float(tensor[0]), 2))


def test_parallelize_keeps_the_multiset_of_tensors_and_its_argument():
    plain = vit()
    before = copy.deepcopy(plain.state_dict())
    made = parallelize(plain)
    assert [type(block) for block in made.blocks] == [ParallelThingsBlock] * 2
    assert [type(block) for block in plain.blocks] == [Block] * 4
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    values = [sorted(tuple(t.flatten().tolist()) for t in each.state_dict().values()) for each in (plain, made)]
    assert values[0] == values[1]
    made.blocks[0].attns[0].attn.qkv.weight.data.zero_()
    assert plain.blocks[0].attn.qkv.weight.abs().sum() > 0, "the copy shares its weights"
    assert not made.training
    assert parallelize(copy.deepcopy(plain).train()).blocks[0].training


def test_a_parallelized_vit_is_timms_own():
    """Its weights load strictly into the parallel ViT that timm builds, which then answers the same."""
    made = parallelize(vit())
    own = vit(depth=2, block_fn=ParallelThingsBlock)
    own.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(own(images()), made(images()))
    assert made.feature_info == own.feature_info
    final, maps = made.forward_intermediates(images())
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)] * 2
    made.set_grad_checkpointing()
    torch.testing.assert_close(made.train().forward_features(images()), final)


def test_parameters_and_macs_of_18x2_are_those_of_36x1():
    with torch.device("meta"):
        models = [timm.create_model(f"vit_small_patch16_{blocks}_224") for blocks in ("36x1", "18x2")]
        models.append(parallelize(models[0]))
        assert [sum(p.numel() for p in model.parameters()) for model in models] == [64_665_448] * 3
        macs = [counted(model, (1, 3, 224, 224)) for model in models]
    assert macs[0] == macs[1] == macs[2] == pytest.approx(13.7e9, rel=0.02)


def scaled(model: nn.Module, factor: float) -> nn.Module:
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, LayerScale):
            module.gamma.data.mul_(factor)
    return made


def test_the_gap_is_quadratic_in_the_layer_scale():
    plain = vit().double()
    x = images().double()
    with torch.no_grad():
        nothing = scaled(plain, 0.0)
        assert torch.equal(parallelize(nothing)(x), nothing(x))
        gaps = []
        for factor in (0.02, 0.01):
            small = scaled(plain, factor)
            gaps.append(float((parallelize(small)(x) - small(x)).norm()))
    assert gaps[0] > 0
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    "more", [{}, {"init_values": None}, {"qkv_bias": False}, {"proj_bias": False}, {"act_layer": "relu"}]
)
def test_merged_branches_answer_the_same(more: dict):
    parallel = parallelize(vit(**more), 2)
    wide = merge_branches(parallel)
    assert [type(block) for block in wide.blocks] == [Block] * 2
    assert wide.blocks[0].attn.num_heads == 2 * parallel.blocks[0].attns[0].attn.num_heads
    assert [type(block) for block in parallel.blocks] == [ParallelThingsBlock] * 2
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(wide(x), parallel(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(wide.double()(x.double()), parallel.double()(x.double()), atol=1e-5, rtol=1e-5)
    if not more:  # of each block: a norm and a bias after attention and after the MLP, and four layer scales
        gone = 2 * (2 * (2 * 24 + 24) + 4 * 24)
        assert sum(p.numel() for p in wide.parameters()) == sum(p.numel() for p in parallel.parameters()) - gone
    assert counted(wide.float(), (1, 3, 32, 32)) == counted(parallel.float(), (1, 3, 32, 32))


def test_merging_needs_branches_that_can_share():
    with pytest.raises(BackboneError, match="vit_tiny_patch16_224 has no parallel blocks to merge: parallelize it"):
        merge_branches(vit())
    for more in ({"qk_norm": True}, {"scale_attn_norm": True}, {"scale_mlp_norm": True}):
        with pytest.raises(BackboneError, match="norms or gates of their own"):
            merge_branches(parallelize(vit(**more)))
    with pytest.raises(BackboneError, match="branches of DiffAttention and Mlp cannot be merged"):
        merge_branches(parallelize(vit(attn_layer="diff")))
    with pytest.raises(BackboneError, match="cannot be merged"):
        merge_branches(parallelize(vit(norm_layer="rmsnorm")))


def test_what_cannot_be_parallelized_says_why():
    with pytest.raises(BackboneError, match="has 4 blocks, which cannot stand 3 by 3: k may be 2, 4"):
        parallelize(vit(), 3)
    with pytest.raises(BackboneError, match="has 5 blocks, which cannot stand 2 by 2: k may be 5"):
        parallelize(vit(depth=5))
    with pytest.raises(BackboneError, match="1 blocks, which cannot stand 2 by 2: one alone"):
        parallelize(vit(depth=1))
    with pytest.raises(BackboneError, match=r"is already parallel \(2x2\): give the sequential one"):
        parallelize(parallelize(vit()))
    with pytest.raises(BackboneError, match="test_efficientnet has blocks of Sequential: parallelize needs timm's"):
        parallelize(timm.create_model("test_efficientnet"))
    with pytest.raises(BackboneError, match="Linear has no sequence of blocks: expected a ViT such as"):
        parallelize(nn.Linear(2, 2))
    with pytest.raises(BackboneError, match="beit_base_patch16_224 has blocks of Block: "), torch.device("meta"):
        parallelize(timm.create_model("beit_base_patch16_224", depth=2))


def stem(**more) -> HMlpStem:
    return noisy(HMlpStem(**{"img_size": 48, "embed_dim": 32, **more}))


@pytest.mark.parametrize(("dim", "count"), [(192, 49_248), (384, 190_656), (768, 749_952), (1024, 1_327_616)])
def test_parameters_of_the_stem(dim: int, count: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in HMlpStem(embed_dim=dim).parameters()) == count


def test_macs_of_the_stem():
    with torch.device("meta"):
        macs = counted(HMlpStem(embed_dim=768), (1, 3, 224, 224))
    assert macs == 56 * 56 * 48 * 192 + 28 * 28 * 768 * 192 + 14 * 14 * 768 * 768 == pytest.approx(0.260e9, rel=0.01)


def naive_stem(layer: HMlpStem, x: Tensor) -> Tensor:
    """Patch by patch, kernel by kernel: matrix products of the pixels that each kernel covers, norms written out."""
    tokens = []
    for top in range(0, x.shape[2], 16):
        for left in range(0, x.shape[3], 16):
            y = x[:, :, top : top + 16, left : left + 16]
            layers = list(layer.proj)
            while layers:
                conv, norm, *layers = layers
                side = conv.stride[0]
                cells = y.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3)
                y = cells @ conv.weight.flatten(1).T + conv.bias
                y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
                if layers:
                    y, layers = F.gelu(y), layers[1:]
                y = y.permute(0, 3, 1, 2)
            tokens.append(y[:, :, 0, 0])
    return torch.stack(tokens, 1)


def test_the_stem_is_the_naive_one_gradients_too():
    layer = stem()
    found = []
    for run in (layer, lambda x: naive_stem(layer, x)):
        x = images(2, 48).requires_grad_()
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in layer.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_patches_do_not_see_each_other():
    layer, x = stem(), images(1, 48)
    changed = x.clone()
    changed[:, :, 16:32, 32:48] += torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before, after = layer(x), layer(changed)
    same = (before == after).all(-1)[0]
    assert same.tolist() == [index != 5 for index in range(9)]


def test_masking_before_and_after_the_stem_is_the_same():
    layer, x = stem(), images(2, 48)
    seen = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 1, 0, 1]]).bool()
    pixels = seen.reshape(2, 1, 3, 1, 3, 1).expand(2, 3, 3, 16, 3, 16).reshape(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(layer(x * pixels)[seen], layer(x)[seen])
    overlapping = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 32, 8, 8)).eval()
    with torch.no_grad():
        a, b = (overlapping(each).flatten(2).mT[seen] for each in (x * pixels, x))
    assert not torch.allclose(a, b), "the check would pass for a stem that leaks"


def test_the_stem_in_any_timm_vit():
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "embed_layer": HMlpStem}
    model = noisy(timm.create_model("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True, **shape))
    with torch.no_grad():
        assert model(images(1, 48)).shape == (1, 3)
        fixed = noisy(timm.create_model("vit_tiny_patch16_224", img_size=64, **shape))
        torch.testing.assert_close(fixed(images(2, 64)), model(images(2, 64)))
        fixed.set_input_size((48, 32))
        assert fixed(images(1, 48)[..., :32]).shape == (1, 3)
    wide = stem(img_size=28, patch_size=14, factors=(7, 2))
    assert wide(images(1, 28)).shape == (1, 4, 32)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(stem())
    assert sum(isinstance(each, nn.SyncBatchNorm) for each in synced.modules()) == 3


def test_no_weights_are_published():
    with pytest.raises(
        BackboneError, match="vit_small_patch16_24x2_224 with pretrained=True: no weights are published"
    ):
        timm.create_model("vit_small_patch16_24x2_224", pretrained=True)


def test_bad_input_of_the_stem():
    with pytest.raises(BackboneError, match=r"patch_size 14: the factors \(4, 2, 2\) make patches of 16"):
        HMlpStem(patch_size=14)
    with pytest.raises(BackboneError, match="embed_dim 30: the hidden layers have a quarter"):
        HMlpStem(embed_dim=30)
    layer = stem()
    with pytest.raises(BackboneError, match="patch_size 8: the kernels of an hMLP stem make patches of 16"):
        layer.set_input_size(patch_size=8)
    layer.train()
    with pytest.raises(BackboneError, match="1 image in training mode: the batch norms of the hMLP stem need"):
        layer(images(1, 48))
    assert layer(images(2, 48)).shape == (2, 9, 32)
    nn.SyncBatchNorm.convert_sync_batchnorm(layer).eval()(images(1, 48))
