import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import foveal.architectures  # noqa: F401
from foveal.architectures.ninformer import NiNBlock, resized
from foveal.core.errors import BackboneError

TINY = ("ninformer_cifar", {"img_size": 64, "patch_size": 16, "embed_dim": 32, "num_blocks": 3})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def block(**more) -> NiNBlock:
    torch.manual_seed(0)
    return NiNBlock(8, 5, **more)


@pytest.mark.parametrize(("name", "parameters"), [("ninformer_cifar", 2_652_170), ("ninformer_mnist", 2_582_478)])
def test_parameters(name: str, parameters: int):
    with torch.device("meta"):
        model = timm.create_model(name)
        separate = timm.create_model(name, shared_norm=False)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *model.default_cfg["input_size"]))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in separate.parameters()) == parameters + 4 * 2 * 256
    assert counter.get_total_flops() / 2e6 == pytest.approx(219 if name == "ninformer_cifar" else 167, rel=0.01)


def test_a_block_follows_the_formula():
    d, n, f = 8, 5, 16
    expected = 6 * d + d * d + d + 2 * n * f + n + f + 2 * (2 * d * f + d + f)
    assert sum(p.numel() for p in block().parameters()) == expected


def naive(each: NiNBlock, x: Tensor) -> Tensor:
    """One image, one token and one channel at a time."""

    def mlp(layer: nn.Module, vector: Tensor) -> Tensor:
        hidden = layer.fc1.weight @ vector + layer.fc1.bias
        return layer.fc2.weight @ nn.functional.gelu(hidden) + layer.fc2.bias

    out = []
    for tokens in x:
        h = each.norm(tokens)
        normed = each.mixer.norm1(h)
        t = h + torch.stack([mlp(each.mixer.mlp_tokens, normed[:, c]) for c in range(x.shape[2])], 1)
        v = t + torch.stack([mlp(each.mixer.mlp_channels, each.mixer.norm2(row)) for row in t])
        gated = torch.stack([(each.gate.weight @ a + each.gate.bias) * b for a, b in zip(h, v, strict=True)])
        y = tokens + gated
        out.append(y + torch.stack([mlp(each.mlp, each.norm(row)) for row in y]))
    return torch.stack(out)


def test_the_block_is_the_naive_one_gradients_too():
    each = block()
    found = []
    for run in (each, lambda x: naive(each, x)):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 8, requires_grad=True)
        each.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in each.parameters()]])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-3)
    assert each.mixer.mlp_tokens.fc1.weight.grad.abs().sum() > 0


def test_a_gate_of_one_is_a_mixer_and_a_gate_of_zero_nothing():
    each = block()
    x = torch.randn(2, 5, 8)
    nn.init.zeros_(each.gate.weight)
    nn.init.ones_(each.gate.bias)
    mixed = x + each.mixer(each.norm(x))
    close(each(x), mixed + each.mlp(each.norm(mixed)))
    nn.init.zeros_(each.gate.bias)
    close(each(x), x + each.mlp(each.norm(x)))


def test_places_matter_unless_the_token_mlp_is_silent():
    each = block()
    x = torch.randn(2, 5, 8)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert (each(x)[:, order] - each(x[:, order])).abs().max() > 1e-2
    nn.init.zeros_(each.mixer.mlp_tokens.fc2.weight)
    nn.init.zeros_(each.mixer.mlp_tokens.fc2.bias)
    close(each(x)[:, order], each(x[:, order]))


def test_the_gate_depends_on_the_input():
    each = block(act_layer=nn.Identity)
    h, step = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for norm in (each.mixer.norm1, each.mixer.norm2):
        norm.forward = lambda x: x
    gated = lambda h: each.gate(h) * each.mixer(h)  # noqa: E731
    second = lambda run: run(h + step) - 2 * run(h) + run(h - step)  # noqa: E731
    assert second(gated).abs().max() > 0.1
    assert second(each.mixer).abs().max() < 1e-4


def test_dropout_sleeps_in_eval():
    each = block(drop=0.5)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(each(x), each(x))
    each.eval()
    assert torch.equal(each(x), each(x))


def test_fewer_operations_than_a_vit():
    with torch.device("meta"):
        models = (
            timm.create_model("ninformer_cifar", img_size=64),
            timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=256, depth=4, num_heads=4),
        )
        flops = []
        for model in models:
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, 64, 64))
            flops.append(counter.get_total_flops())
    assert flops[0] < flops[1]


def test_a_copy_for_another_size():
    torch.manual_seed(0)
    model = timm.create_model(TINY[0], **TINY[1]).eval()
    model.head.weight.data.normal_()
    same = resized(model, 64)
    x = torch.randn(1, 3, 64, 64)
    close(same(x), model(x), 1e-6)
    fine = resized(model, 128).blocks[0].mixer.mlp_tokens
    coarse = model.blocks[0].mixer.mlp_tokens
    assert fine.fc1.weight.shape[1] == 64
    close(fine.fc1.weight.sum(1), coarse.fc1.weight.sum(1))  # equal tokens make equal sums
    close(fine.fc2.weight.mean(0), coarse.fc2.weight.mean(0))
    assert model.blocks[0].seq_len == 16
    resized(model, 96)(torch.randn(1, 3, 96, 96)).sum().backward()


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="6 tokens, built for 5"):
        block()(torch.zeros(1, 6, 8))
    with pytest.raises(BackboneError, match="30x30 pixels: patches of 4 do not divide"):
        timm.create_model("ninformer_cifar", img_size=30)
    with pytest.raises(BackboneError, match=r"shape \(3, 48, 32\): the model was built for \(3, 32, 32\)"):
        timm.create_model("ninformer_cifar", num_blocks=1)(torch.zeros(1, 3, 48, 32))
    with pytest.raises(BackboneError, match=r"shape \(3, 28, 28\): the model was built for \(1, 28, 28\)"):
        timm.create_model("ninformer_mnist", num_blocks=1)(torch.zeros(1, 3, 28, 28))
    with pytest.warns(UserWarning, match=r"dropout 0\.5 on width 32 underfits"):
        timm.create_model("ninformer_cifar", embed_dim=32, proj_drop_rate=0.5)
