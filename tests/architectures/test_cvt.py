import pytest
import timm
import torch
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.cvt import ConvAttention, ConvProjection, checkpoint_filter_fn
from foveal.core.errors import BackboneError

TINY = ("cvt_13", {"dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 1, 2)})


def tiny(**more):
    return timm.create_model(TINY[0], **{**TINY[1], "num_classes": 5, **more})


def loud(module: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.05, 0.2)
        for each in module.modules():
            if isinstance(each, nn.BatchNorm1d):
                each.running_mean.normal_(0, 0.2)
                each.running_var.uniform_(0.5, 2)
    return module.eval()


def naive(layer: ConvAttention, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """One image [P + H W, C]: every projection, head and query by itself."""
    height, width = size
    dim, prefix = tokens.shape[1], len(tokens) - height * width
    maps = tokens[prefix:].reshape(height, width, dim)

    def project(conv: ConvProjection, linear: nn.Linear) -> Tensor:
        stride, rows = conv.conv.stride[0], list(tokens[:prefix])
        for i in range(0, height, stride):
            for j in range(0, width, stride):
                total = torch.zeros(dim, dtype=tokens.dtype)
                for u in (-1, 0, 1):
                    for v in (-1, 0, 1):
                        if 0 <= i + u < height and 0 <= j + v < width:
                            total = total + maps[i + u, j + v] * conv.conv.weight[:, 0, u + 1, v + 1]
                bn = conv.bn
                rows.append((total - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias)
        return torch.stack([linear(row) for row in rows])

    q, k, v = project(layer.conv_q, layer.q), project(layer.conv_k, layer.k), project(layer.conv_v, layer.v)
    d = dim // layer.heads
    heads = []
    for h in range(layer.heads):
        own = slice(h * d, (h + 1) * d)
        heads.append(torch.stack([((query[own] @ k[:, own].T) / dim**0.5).softmax(0) @ v[:, own] for query in q]))
    return layer.proj(torch.cat(heads, -1))


@pytest.mark.parametrize("prefix", [0, 1])
def test_attention_is_the_naive_one_gradients_too(prefix: int):
    layer = loud(ConvAttention(6, 2)).double()
    x = torch.randn(1, prefix + 4 * 5, 6, dtype=torch.double, requires_grad=True)
    expected = naive(layer, x[0], (4, 5))[None]
    torch.testing.assert_close(layer(x, (4, 5)), expected)
    variables = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x, (4, 5)).sin().sum(), variables)
    theirs = torch.autograd.grad(expected.sin().sum(), variables)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_are_scaled_by_the_full_width_not_a_heads():
    layer = ConvAttention(16, 4)
    assert layer.scale == 16**-0.5 != 4**-0.5


def test_grids_and_tokens_of_keys():
    model = tiny().eval()
    seen: list[tuple[int, int]] = []
    for stage in model.stages:
        stage.blocks[0].attn.conv_k.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape[1:2])))
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, 224, 224), intermediates_only=True)
    assert [tuple(each.shape[2:]) for each in maps] == [(56, 56), (28, 28), (14, 14)]
    assert seen == [(28 * 28,), (14 * 14,), (7 * 7,)]
    assert (224 + 4 - 7) // 4 + 1 == 56


def test_one_set_of_weights_serves_any_size_and_a_single_image_keeps_its_batch():
    model = loud(tiny())
    for height, width in ((64, 64), (96, 160), (224, 256)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 5)
    with torch.device("meta"):
        a, b = (timm.create_model("cvt_13", pretrained_cfg_overlay={"input_size": (3, s, s)}) for s in (224, 384))
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


def test_projections_fold_their_batch_norms():
    model = loud(tiny())
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    for _ in range(2):
        model.reparameterize()
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_weights_under_hugging_faces_names_give_its_logits():
    from transformers import CvtConfig, CvtForImageClassification

    theirs = CvtForImageClassification(
        CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=5)
    )
    loud(theirs)
    model = tiny(act_layer="gelu", depths=(1, 2, 3)).eval()
    mapped = checkpoint_filter_fn(theirs.state_dict(), model)
    assert mapped.keys() == model.state_dict().keys()
    model.load_state_dict(mapped)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=1e-4)


def test_published_names_are_ours_after_the_filter():
    model = tiny()
    published = {}
    for ours, tensor in model.state_dict().items():
        theirs = ours
        for i in range(3):
            theirs = theirs.replace(f"stages.{i}.", f"stage{i}.")
        for a, b in ((".downsample.0.", ".patch_embed.proj."), (".downsample.1.", ".patch_embed.norm.")):
            theirs = theirs.replace(a, b)
        for one in "qkv":
            theirs = theirs.replace(f".attn.conv_{one}.", f".attn.conv_proj_{one}.")
            theirs = theirs.replace(f".attn.{one}.", f".attn.proj_{one}.")
        published[theirs.replace("head.fc.", "head.")] = tensor
    assert "stage2.blocks.1.attn.conv_proj_k.bn.running_mean" in published
    assert "stage2.cls_token" in published
    mapped = checkpoint_filter_fn(published, model)
    assert all(torch.equal(mapped[key], value) for key, value in model.state_dict().items())
    assert mapped.keys() == model.state_dict().keys()


def test_the_mean_of_tokens_can_be_read_instead_of_the_class_token():
    model = loud(tiny())
    x = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 16, 32)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    without = tiny(cls_token=False, global_pool="avg").eval()
    assert without.forward_features(x).shape == (2, 16, 32)
    (last,) = model.forward_intermediates(x, indices=[2], norm=True, intermediates_only=True)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens[:, 1:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny(num_heads=(1, 3, 4)), "3 heads do not divide 16 channels"),
        (lambda: tiny(depths=(1, 2)), r"depths \(1, 2\)"),
        (lambda: tiny()(torch.zeros(1, 3, 24, 64)), "24x64"),
        (lambda: tiny(global_pool="max"), r"'max'.*'token' or 'avg'"),
        (lambda: tiny(cls_token=False), r"'token'.*'avg', since there is no class token"),
        (lambda: tiny(stride_kv=8)(torch.zeros(1, 3, 64, 64)), "stride_kv 8 is larger than the last map, 4 places"),
        (
            lambda: checkpoint_filter_fn(tiny(num_classes=7).state_dict(), tiny()),
            "head has 7 rows, the model 5 classes",
        ),
        (lambda: checkpoint_filter_fn(tiny(depths=(1, 2, 2)).state_dict(), tiny()), r"stages\.1\.blocks\.1"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message):
        build()
