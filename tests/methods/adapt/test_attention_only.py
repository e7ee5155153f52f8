import copy

import pytest
import torch
from tests.methods.adapt.small_backbones import images, random_backbone, small_cnn, small_pvt, small_vit, steps
from torch import nn

from foveal.core.errors import BackboneError
from foveal.core.method import trainable
from foveal.methods.adapt.attention_only import (
    AttentionOnly,
    Options,
    apply_delta,
    attention_only,
    extract_delta,
    ffn_only,
)


def test_names_on_a_plain_vit() -> None:
    vit = small_vit(depth=2)
    expected = [
        f"model.blocks.{block}.attn.{part}.{kind}"
        for block in (0, 1)
        for part in ("qkv", "proj")
        for kind in ("weight", "bias")
    ]
    assert attention_only(vit) == expected
    assert [name for name, _ in trainable(vit)] == expected
    assert attention_only(vit, positions=True) == ["model.pos_embed", *expected]
    assert AttentionOnly(Options(positions=True)).attach(vit, 3).backbone.model.pos_embed.requires_grad
    assert not AttentionOnly().attach(vit, 3).backbone.model.pos_embed.requires_grad
    mlp = ffn_only(vit)
    assert mlp == [name for name, _ in trainable(vit)]
    assert mlp == [
        f"model.blocks.{block}.mlp.{part}.{kind}"
        for block in (0, 1)
        for part in ("fc1", "fc2")
        for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("arch", "attention"),
    [("vit_tiny_patch16_224", 1_778_688), ("vit_small_patch16_224", 7_096_320), ("vit_base_patch16_224", 28_348_416)],
)
def test_the_papers_share_of_attention_weights(arch: str, attention: int) -> None:
    import timm

    with torch.device("meta"):
        vit = timm.create_model(arch)
    names = attention_only(vit)
    assert sum(vit.get_parameter(name).numel() for name in names) == attention
    share = attention / sum(p.numel() for p in vit.parameters())
    assert share == pytest.approx({"t": 0.311, "s": 0.322, "b": 0.327}[arch[4]], abs=5e-4)


def test_windowed_transformers_and_beit_work() -> None:
    swin = random_backbone(
        "swin_tiny_patch4_window7_224", 64, 0,
        img_size=32, patch_size=4, window_size=4, embed_dim=32, depths=(1, 1), num_heads=(2, 2),
    )  # fmt: skip
    assert len(attention_only(swin)) == 2 * 4
    beit = random_backbone(
        "beit_base_patch16_224", 32, 0, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    )
    assert {name.rsplit(".", 1)[-1] for name in attention_only(beit)} == {"weight", "bias", "q_bias", "v_bias"}


def test_queries_and_keys_made_by_two_layers_learn() -> None:
    expected = {
        f"model.stages.{stage}.blocks.0.attn.{part}.{kind}"
        for stage in range(4)
        for part in ("q", "kv", "proj")
        for kind in ("weight", "bias")
    }
    pvt = small_pvt()
    assert set(attention_only(pvt)) == expected
    assert {name for name, _ in trainable(pvt)} == expected
    model = AttentionOnly().attach(small_pvt(), 3)
    before = copy.deepcopy(model.state_dict())
    steps(AttentionOnly(), model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.removeprefix("backbone.") for name in changed} - {"head.weight", "head.bias"} <= expected
    assert "backbone.model.stages.0.blocks.0.attn.kv.weight" in changed


def test_training_changes_exactly_the_named_tensors() -> None:
    method = AttentionOnly()
    backbone = small_vit(drop_path_rate=0.5)
    model = method.attach(backbone, 3)
    named = {name for name, _ in trainable(model)}
    before = copy.deepcopy(model.state_dict())
    steps(method, model, 5)
    delta = extract_delta(model, before)
    assert delta.keys() == named
    assert not any(module.training for module in backbone.modules())


def test_a_delta_on_the_base_gives_the_task_back() -> None:
    method = AttentionOnly(Options(lr=1e-2))
    model = method.attach(small_vit(), 3)
    base = copy.deepcopy(model.state_dict())
    steps(method, model, 5)
    delta = extract_delta(model, base)
    stored = sum(tensor.numel() for tensor in delta.values())
    assert stored == 3 * (64 * 192 + 192 + 64 * 64 + 64) + 64 * 3 + 3
    other = method.attach(small_vit(), 3)
    assert not torch.allclose(other.eval()(images()), model.eval()(images()), atol=1e-3)
    apply_delta(other, delta)
    torch.testing.assert_close(other(images()), model(images()), atol=1e-6, rtol=1e-6)
    next(iter(delta.values())).zero_()  # a copy: the model it came from does not follow
    torch.testing.assert_close(other(images()), model(images()), atol=1e-6, rtol=1e-6)


def test_gradients_are_those_of_full_training() -> None:
    vit = small_vit()
    whole = copy.deepcopy(vit).requires_grad_(True)
    whole(images()).square().sum().backward()
    names = attention_only(vit)
    vit(images()).square().sum().backward()
    for name, parameter in vit.named_parameters():
        if name in names:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, atol=1e-4, rtol=1e-4)
        else:
            assert parameter.grad is None


def test_a_network_without_attention_says_so() -> None:
    with pytest.raises(BackboneError, match="no self-attention blocks found in test_efficientnet"):
        AttentionOnly().attach(small_cnn(), 3)
    with pytest.raises(BackboneError, match="no transformer blocks with an mlp"):
        ffn_only(small_cnn())


def test_a_delta_of_another_base_is_refused_before_anything_changes() -> None:
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    delta = {"model.norm.weight": torch.ones(64), "model.norm.bias": torch.zeros(65)}
    with pytest.raises(BackboneError, match=r"model.norm.bias of shape \(65,\), the model shape \(64,\)"):
        apply_delta(model, delta)
    with pytest.raises(BackboneError, match="no such tensor"):
        apply_delta(model, {"other": torch.ones(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model, nn.Module)
