import copy

import pytest
import torch
from tests.methods.adapt.small_backbones import images, random_backbone, small_cnn, small_pvt, small_vit, steps
from torch import nn

from foveal.core.errors import BackboneError
from foveal.core.method import Classifier, trainable
from foveal.methods.adapt.lora import Lora, Options, called, correctable

BACKBONES = {
    "vit": small_vit,
    "cnn": small_cnn,
    "resnet": lambda: random_backbone("test_resnet", 96, 0),
    "convnext": lambda: random_backbone("test_convnext", 64, 0),
}


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_merged_equals_unmerged_and_a_naive_sum(kind: str, targets) -> None:
    backbone = BACKBONES[kind]()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    method = Lora(Options(rank=3, alpha=5.0, targets=targets))
    chosen = correctable(backbone, targets)
    model = method.attach(backbone, 3)
    nn.init.normal_(model.head.weight, std=0.1)
    thin = dict(trainable(model))
    with torch.no_grad():
        for name, parameter in thin.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    thin = {name.replace("backbone.model.", "", 1): tensor.detach().clone() for name, tensor in thin.items()}
    with torch.no_grad():
        unmerged = model.eval()(images())
        merged = method.finish(model).eval()
        scale = unmerged.abs().max().clamp(min=1)
        torch.testing.assert_close(merged(images()) / scale, unmerged / scale, atol=1e-5, rtol=0)
    assert type(merged) is Classifier
    assert type(merged.backbone) is type(backbone)
    after = merged.backbone.state_dict()
    assert after.keys() == before.keys()
    for name in chosen:  # W + (alpha / r) B A, written out
        A, B = thin[f"{name}.lora_A.default.weight"], thin[f"{name}.lora_B.default.weight"]
        product = torch.einsum("or,r...->o...", B.flatten(1), A) * (5.0 / 3)
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + product, atol=1e-5, rtol=1e-5)
    untouched = before.keys() - {f"{name}.weight" for name in chosen}
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_gradients_agree_with_a_naive_implementation() -> None:
    backbone = small_vit(depth=1)
    plain = copy.deepcopy(backbone)
    model = Lora(Options(rank=2, alpha=4.0)).attach(backbone, 3).eval()
    nn.init.normal_(model.head.weight)
    thin = {name: p for name, p in trainable(model) if "lora" in name}
    with torch.no_grad():
        for parameter in thin.values():
            parameter.normal_(std=0.1)
    own = torch.autograd.grad(model(images()).square().sum(), list(thin.values()))
    twins = {name: p.detach().clone().requires_grad_() for name, p in thin.items()}
    weights = {}
    for name in correctable(plain, "attention"):
        A, B = (twins[f"backbone.model.{name}.lora_{side}.default.weight"] for side in "AB")
        weights[f"{name}.weight"] = plain.get_parameter(f"{name}.weight").detach() + 2.0 * B @ A
    logits = model.head(torch.func.functional_call(plain, weights, (images(),)))
    other = torch.autograd.grad(logits.square().sum(), list(twins.values()))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one / two.abs().max(), two / two.abs().max(), atol=1e-4, rtol=0)


def test_the_start_changes_nothing() -> None:
    backbone = small_vit()
    expected = copy.deepcopy(backbone)(images())
    model = Lora().attach(backbone, 3).eval()
    assert torch.equal(model.features(images()), expected)
    assert torch.equal(model(images()), torch.zeros(3, 3))


def test_which_layers_are_corrected() -> None:
    assert correctable(small_vit(depth=2), "attention") == [
        f"model.blocks.{block}.attn.{part}" for block in (0, 1) for part in ("qkv", "proj")
    ]
    everything = correctable(small_vit(depth=1), "all")
    assert {"model.blocks.0.mlp.fc1", "model.patch_embed.proj"} <= set(everything)
    cnn = small_cnn()
    kernels = {cnn.get_submodule(name).kernel_size for name in correctable(cnn, "attention")}
    assert kernels == {(1, 1)}


def test_queries_and_keys_made_by_two_layers_are_corrected() -> None:
    pvt = small_pvt()
    expected = {f"model.stages.{stage}.blocks.0.attn.{part}" for stage in range(4) for part in ("q", "kv", "proj")}
    assert set(correctable(pvt, "attention")) == expected
    model = Lora(Options(rank=2)).attach(pvt, 3)
    moved = {name.split(".lora_")[0].removeprefix("backbone.model.") for name, _ in trainable(model)}
    assert moved - {"head.weight", "head.bias"} == expected


def test_layers_whose_weights_are_read_past_them_are_left_out() -> None:
    beit = random_backbone(
        "beit_base_patch16_224", 32, 0, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    )
    names = correctable(beit, "attention")
    assert names == ["model.blocks.0.attn.proj"]
    assert not any(module._forward_pre_hooks for module in beit.modules())
    assert called(beit, ["model.blocks.0.attn.qkv"]) == []


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_training_moves_corrections_and_head_only_and_keeps_statistics(kind: str) -> None:
    backbone = BACKBONES[kind]()
    method = Lora(Options(rank=2, dropout=0.3))
    model = method.attach(backbone, 3)
    before = copy.deepcopy(model.state_dict())
    steps(method, model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in trainable(model)}
    assert all("lora_" in name or name.startswith("head.") for name in changed)
    model.train()
    in_training = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module.training and name}
    assert "default" in in_training  # the dropout of the corrections
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_a_backbone_without_layers_to_correct_is_refused() -> None:
    class Nothing(nn.Module):
        arch, family, preprocessing = "nothing", "cnn", small_vit().preprocessing

        def attention_modules(self):
            return []

        def forward(self, images):
            return images.mean((2, 3))

    with pytest.raises(BackboneError, match=r"nothing \(cnn\) has no attention or convolution that LoRA can correct"):
        Lora().attach(Nothing(), 3)
