import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.edgevit import SparseAttention
from foveal.core.errors import BackboneError

TINY = ("edgevit_xxs", {"dims": (8, 16, 16, 32), "head_dim": 8, "depths": (1, 1, 1, 1)})


def loud(module: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.05, 0.3)
        for each in module.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.running_mean.normal_(0, 0.2)
                each.running_var.uniform_(0.5, 2)
    return module.eval()


def naive(layer: SparseAttention, x: Tensor) -> Tensor:
    """Windows, heads and places one by one."""
    batch, height, width, dim = x.shape
    r, d = layer.r, dim // layer.heads
    out = torch.zeros_like(x)
    for b in range(batch):
        corners = [(i, j) for i in range(0, height, r) for j in range(0, width, r)]
        q, k, v = torch.stack([layer.qkv(x[b, i, j]) for i, j in corners]).split(dim, -1)
        answers = torch.zeros_like(q)
        for h in range(layer.heads):
            own = slice(h * d, (h + 1) * d)
            for n in range(len(corners)):
                scores = torch.stack([q[n, own] @ k[m, own] * d**-0.5 for m in range(len(corners))])
                answers[n, own] = scores.softmax(0) @ v[:, own]
        for n, (i, j) in enumerate(corners):
            for a in range(r):
                for c in range(r):
                    place = answers[n]
                    if r > 1:
                        place = layer.norm(place * layer.spread.weight[:, 0, a, c] + layer.spread.bias)
                    out[b, i + a, j + c] = layer.proj(place)
    return out


@pytest.mark.parametrize("r", [1, 2, 4])
def test_sparse_attention_is_the_naive_one_gradients_too(r: int):
    layer = loud(SparseAttention(6, 3, r)).double()
    x = torch.randn(1, 4, 8 if r > 1 else 3, 6, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(layer(x), naive(layer, x))
    variables = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).sin().sum(), variables)
    theirs = torch.autograd.grad(naive(layer, x).sin().sum(), variables)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_without_windows_it_is_textbook_attention():
    layer = loud(SparseAttention(8, 4, 1))
    textbook = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        textbook.in_proj_weight.copy_(layer.qkv.weight)
        textbook.in_proj_bias.copy_(layer.qkv.bias)
        textbook.out_proj.weight.copy_(layer.proj.weight)
        textbook.out_proj.bias.copy_(layer.proj.bias)
    x = torch.randn(2, 3, 5, 8)
    tokens = x.flatten(1, 2)
    expected = textbook(tokens, tokens, tokens)[0].reshape(2, 3, 5, 8)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("r", [2, 4])
def test_delegates_are_the_top_left_places(r: int):
    layer, x = SparseAttention(4, 4, r), torch.randn(2, 8, 12, 4)
    chosen = layer.delegates(x)
    pooled = nn.AvgPool2d(1, r)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(chosen, pooled)
    places, dense = chosen.shape[1] * chosen.shape[2], 8 * 12
    assert places == (8 // r) * (12 // r)
    assert places**2 * r**4 == dense**2  # pairs of the attention matrix


def test_only_delegates_speak_to_other_windows():
    layer = loud(SparseAttention(8, 4, 2))
    x = torch.randn(1, 8, 8, 8)
    before = layer(x)
    bystander, delegate = x.clone(), x.clone()
    bystander[0, 3, 3] += 1
    delegate[0, 2, 2] += 1
    assert torch.equal(layer(bystander), before)
    changed = (layer(delegate) - before).abs().amax(-1)[0]
    assert (changed > 0).all()


def test_batch_norms_fold_into_the_convolutions_after_them():
    model = loud(timm.create_model(TINY[0], num_classes=5, **TINY[1]))
    with torch.no_grad():
        model.head.fc.weight.mul_(0.1)
    x = torch.randn(2, 3, 64, 96)
    before = model(x)
    folded = reparameterize_model(model)
    torch.testing.assert_close(folded(x), before, atol=1e-5, rtol=1e-5)
    model.reparameterize()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 1  # the last, before pooling


def test_ablations_drop_what_they_say():
    full = timm.create_model(TINY[0], **TINY[1])
    nearest = timm.create_model(TINY[0], spread="nearest", **TINY[1])
    assert full.state_dict().keys() - nearest.state_dict().keys() == {
        f"stages.{i}.blocks.0.sparse.attn.spread.{part}" for i in range(3) for part in ("weight", "bias")
    }
    layer, x = loud(SparseAttention(4, 4, 2, "nearest")), torch.randn(1, 4, 4, 4)
    out = layer(x)
    assert torch.equal(out[:, ::2, ::2], out[:, 1::2, 1::2])
    alone = timm.create_model(TINY[0], local=False, **TINY[1])
    assert not any(".local." in name for name in alone.state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model(*TINY[:1], **TINY[1])(torch.zeros(1, 3, 240, 240)), r"240/16 = 15.*224 or 256"),
        (lambda: timm.create_model(*TINY[:1], **TINY[1])(torch.zeros(1, 3, 64, 100)), r"64x100.*96 or 128"),
        (lambda: timm.create_model("edgevit_xxs", dims=(36, 72, 140, 288)), "140 channels are no multiple of head_dim"),
        (lambda: timm.create_model("edgevit_xxs", windows=(4, 2, 1)), r"windows \(4, 2, 1\)"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message):
        build()
