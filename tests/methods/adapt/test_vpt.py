import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.methods.adapt.small_backbones import images, random_backbone, small_cnn, small_vit, steps
from torch import Tensor, nn

from foveal.backbones.adapter import load_backbone
from foveal.core.errors import BackboneError, UsageError
from foveal.core.method import Classifier, trainable
from foveal.core.options import parse_options
from foveal.methods.adapt.vpt import Options, PromptedClassifier, Vpt, insert_prompts, prompt_bound, strip_prompts

VARIANTS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "average": {"class_token": False, "global_pool": "avg"},
    "average beside a class token": {"global_pool": "avg"},
}


def prompted(backbone, **options) -> PromptedClassifier:
    torch.manual_seed(7)
    model = Vpt(Options(**options)).attach(backbone, 3)
    nn.init.normal_(model.head.weight)
    assert isinstance(model, PromptedClassifier)
    return model


def naive(model: PromptedClassifier, image: Tensor, deep: bool) -> Tensor:
    """Logits of one image, token by token, with timm's own pieces."""
    vit = model.backbone.model
    tokens = list(vit._pos_embed(vit.patch_embed(image[None]))[0])
    prefix, count = vit.num_prefix_tokens, model.prompts.shape[1]
    for index, block in enumerate(vit.blocks):
        if index == 0:
            tokens = tokens[:prefix] + list(model.prompts[0]) + tokens[prefix:]
        elif deep:
            tokens[prefix : prefix + count] = list(model.prompts[index])
        tokens = list(block(torch.stack(tokens)[None])[0])
    del tokens[prefix : prefix + count]
    kept = torch.stack(tokens)
    if vit.global_pool == "avg":
        return model.head(vit.fc_norm(vit.norm(kept)[prefix:].mean(0)))
    return model.head(vit.fc_norm(vit.norm(kept)[0]))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_a_naive_implementation_in_values_and_gradients(variant: str, deep: bool) -> None:
    model = prompted(small_vit(**VARIANTS[variant]), prompts=4, deep=deep)
    batch = images()
    logits = model(batch)
    torch.testing.assert_close(
        logits, torch.stack([naive(model, image, deep) for image in batch]), atol=1e-4, rtol=1e-4
    )
    target = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    own = torch.autograd.grad((logits * target).sum(), [model.prompts, *model.head.parameters()])
    total = sum((naive(model, image, deep) * row).sum() for image, row in zip(batch, target, strict=True))
    assert isinstance(total, Tensor)
    other = torch.autograd.grad(total, [model.prompts, *model.head.parameters()])
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("deep", [True, False])
def test_no_prompts_is_linear_probing_to_the_bit(variant: str, deep: bool) -> None:
    backbone = small_vit(**VARIANTS[variant])
    model = prompted(backbone, prompts=0, deep=deep).eval()
    with torch.no_grad():
        assert torch.equal(model(images()), Classifier(backbone, model.head)(images()))


def test_deep_with_one_block_is_shallow() -> None:
    deep, shallow = (prompted(small_vit(depth=1), prompts=4, deep=deep) for deep in (True, False))
    assert torch.equal(deep.prompts, shallow.prompts)
    assert torch.equal(deep(images()), shallow(images()))


@pytest.mark.parametrize(("deep", "expected"), [(False, 4 * 64), (True, 3 * 4 * 64)])
def test_what_learns(deep: bool, expected: int) -> None:
    model = prompted(small_vit(), prompts=4, deep=deep)
    assert sum(p.numel() for _, p in trainable(model)) == expected + 64 * 3 + 3
    assert {name for name, _ in trainable(model)} == {"prompts", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("p", "shallow", "deep"), [(1, 768, 9216), (5, 3840, 46080), (10, 7680, 92160), (50, 38400, 460800)]
)
def test_the_papers_table_for_vit_b16(p: int, shallow: int, deep: int) -> None:
    with torch.device("meta"):
        backbone = random_backbone("vit_base_patch16_224", 768, 0, img_size=32)
    backbone = backbone.to_empty(device="cpu")
    for expected, kind in ((shallow, False), (deep, True)):
        model = Vpt(Options(prompts=p, deep=kind)).attach(backbone, 10)
        assert sum(x.numel() for _, x in trainable(model)) - (768 * 10 + 10) == expected


def test_token_counts_class_token_and_patch_order_at_every_block() -> None:
    backbone = small_vit()
    model = prompted(backbone, prompts=4)
    plain, seen = [], []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in backbone.blocks]
    model(images())
    given = seen.copy()
    seen.clear()
    backbone(images())
    plain.extend(seen)
    for hook in hooks:
        hook.remove()
    assert [tokens.shape[1] for tokens in given] == [1 + 4 + 16] * 3
    # before block 0 the class token and the patches are the unprompted ones, positions included
    assert torch.equal(strip_prompts(given[0], 4, 1), plain[0])
    for index in range(3):
        assert torch.equal(given[index][:, 1:5], model.prompts[index].expand(3, -1, -1))


def test_insert_and_strip_are_inverse() -> None:
    tokens, prompts = torch.randn(2, 9, 5), torch.randn(2, 3, 5)
    both = insert_prompts(tokens, prompts, 2)
    assert torch.equal(both[:, :2], tokens[:, :2])
    assert torch.equal(both[:, 2:5], prompts)
    assert torch.equal(strip_prompts(both, 3, 2), tokens)


def test_order_of_prompts_does_not_matter() -> None:
    model = prompted(small_vit(), prompts=5)
    with torch.no_grad():
        before = model(images())
        model.prompts.copy_(model.prompts[:, [3, 0, 4, 1, 2]])
        torch.testing.assert_close(model(images()), before, atol=1e-5, rtol=1e-5)


def test_deep_blocks_do_not_see_what_became_of_earlier_prompts() -> None:
    backbone = small_vit()
    deep, shallow = (prompted(backbone, prompts=4, deep=kind) for kind in (True, False))

    def perturb(_, __, tokens):
        return torch.cat([tokens[:, :1], tokens[:, 1:5] + torch.linspace(-9, 9, 64), tokens[:, 5:]], dim=1)

    with torch.no_grad():
        before = deep(images()), shallow(images())
        hook = backbone.blocks[0].register_forward_hook(perturb)
        after = deep(images()), shallow(images())
        hook.remove()
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


def test_gradients_reach_every_prompt_and_no_backbone_weight() -> None:
    model = prompted(small_vit(), prompts=4)
    model.train()
    model(images()).square().sum().backward()
    assert model.prompts.grad is not None
    assert (model.prompts.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_training_changes_prompts_and_head_and_no_byte_of_the_backbone() -> None:
    method = Vpt(Options(prompts=4, dropout=0.1))
    backbone = small_vit(drop_path_rate=0.5, proj_drop_rate=0.5)
    model = method.attach(backbone, 3)
    before = copy.deepcopy(model.state_dict())
    steps(method, model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"prompts", "head.weight", "head.bias"}
    model.train()
    assert not any(module.training for module in backbone.modules())
    assert model.training


def test_dropout_works_per_image_in_training_only() -> None:
    model = prompted(small_vit(), prompts=8, dropout=0.5)
    same = images(1).expand(2, -1, -1, -1)
    model.train()
    one, two = model(same).detach()
    assert not torch.allclose(one, two, atol=1e-4)
    model.eval()
    one, two = model(same).detach()
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_a_task_is_prompts_and_head_and_fits_a_fresh_backbone(tmp_path) -> None:
    method = Vpt(Options(prompts=4))
    model = method.attach(small_vit(), 3)
    steps(method, model)
    save_file({name: p.detach() for name, p in trainable(model)}, tmp_path / "task.safetensors")
    task = load_file(tmp_path / "task.safetensors")
    assert sum(tensor.numel() for tensor in task.values()) == 3 * 4 * 64 + 64 * 3 + 3
    fresh = method.attach(small_vit(), 3)
    assert not fresh.load_state_dict(task, strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images()), model.eval()(images()))


def test_start_is_uniform_within_the_papers_bound() -> None:
    assert prompt_bound(16, 768) == 0.0625
    model = prompted(small_vit(), prompts=100)
    bound = math.sqrt(6 / (3 * 8**2 + 64))
    assert model.prompts.abs().max() <= bound
    assert model.prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert model.prompts.mean().item() == pytest.approx(0, abs=0.01)


def test_networks_without_one_token_sequence_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"VPT needs transformer blocks .*test_efficientnet \(cnn\).*--method lora"):
        Vpt().attach(small_cnn(), 3)
    swin = load_backbone("swin_tiny_patch4_window7_224", pretrained=False)
    with pytest.raises(BackboneError, match=r"swin_tiny_patch4_window7_224 \(windowed\) has none"):
        Vpt().attach(swin, 3)


def test_wrong_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"prompts=-1: .*greater than or equal to 0.*depth: unknown"):
        parse_options(Options, {"prompts": "-1", "depth": "3"}, "vpt")
