import itertools
import math

import pytest
import timm
import torch
from torch import Tensor

import foveal.architectures  # noqa: F401
from foveal.architectures.t2t_vit import (
    PerformerLayer,
    T2TModule,
    TransformerLayer,
    performer_attention,
    positive_features,
    sinusoids,
)
from foveal.core.errors import BackboneError

TINY = ("t2t_vit_7", {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2})

TRAINABLE = {
    "t2t_vit_7": 4_255_694,
    "t2t_vit_10": 5_834_702,
    "t2t_vit_12": 6_887_374,
    "t2t_vit_14": 21_465_806,
    "t2t_vit_19": 39_085_070,
    "t2t_vit_24": 64_000_974,
    "t2t_vit_t_14": 21_465_422,
    "t2t_vit_t_19": 39_084_686,
    "t2t_vit_t_24": 64_000_590,
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def small(**more):
    torch.manual_seed(0)
    return timm.create_model(TINY[0], num_classes=3, **{**TINY[1], **more})


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_table_and_the_random_features_are_all_that_is_frozen(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == TRAINABLE[name]
    assert total - trained == 197 * model.embed_dim + (0 if "_t_" in name else 2 * 32 * 64)


def test_at_384_pixels_only_the_table_is_longer():
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_14", img_size=384)
    assert sum(p.numel() for p in model.parameters()) == 21_691_470


def windows(x: Tensor, k: int, s: int, p: int) -> Tensor:
    """[C, H, W] -> [N, C k k], one window after another, row by row."""
    channels, height, width = x.shape
    padded = torch.zeros(channels, height + 2 * p, width + 2 * p)
    padded[:, p : p + height, p : p + width] = x
    rows = range(0, height + 2 * p - k + 1, s)
    columns = range(0, width + 2 * p - k + 1, s)
    return torch.stack([padded[:, i : i + k, j : j + k].reshape(-1) for i, j in itertools.product(rows, columns)])


def token_layer(layer, x: Tensor) -> Tensor:
    """[N, D] -> [N, 64], one query at a time."""
    h = layer.norm1(x)
    if isinstance(layer, TransformerLayer):
        q, k, v = (h @ w.T for w in layer.qkv.weight.split(64))
        scores = q @ k.T / math.sqrt(x.shape[1])
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    else:
        k, q, v = (h @ w.T + b for w, b in zip(layer.kqv.weight.split(64), layer.kqv.bias.split(64), strict=True))
        phi = lambda a: (layer.w @ a - a.square().sum() / 2).exp()  # noqa: E731
        similar = torch.stack([torch.stack([phi(a) @ phi(b) for b in k]) for a in q])
        weights = similar / similar.sum(1, keepdim=True)
    y = v + torch.stack([(row[:, None] * v).sum(0) for row in weights]) @ layer.proj.weight.T + layer.proj.bias
    return y + layer.mlp(layer.norm2(y))


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_the_module_is_the_naive_one_on_an_oblong_image_gradients_too(tokens_type: str):
    torch.manual_seed(0)
    module = T2TModule((16, 32), embed_dim=8, tokens_type=tokens_type)
    image = torch.randn(1, 3, 16, 32)

    def naive() -> Tensor:
        x = token_layer(module.attention1, windows(image[0], 7, 4, 2)).T.reshape(64, 4, 8)
        x = token_layer(module.attention2, windows(x, 3, 2, 1)).T.reshape(64, 2, 4)
        return module.project(windows(x, 3, 2, 1))[None]

    found = []
    for run in (lambda: module(image), naive):
        module.zero_grad()
        y = run()
        y.square().sum().backward()
        found.append((y.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    assert found[0][0].shape == (1, 2, 8)
    close(found[0][0], found[1][0])
    assert len(found[0][1]) == len(list(module.parameters())) - (2 if tokens_type == "performer" else 0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        close(a, b, 1e-3)


def test_grids_of_the_three_splits():
    sizes: list[tuple[int, ...]] = []
    module = T2TModule(224, embed_dim=8).eval()
    for layer in (module.attention1, module.attention2, module.project):
        layer.register_forward_hook(lambda _, given, out: sizes.append((given[0].shape[1], given[0].shape[2])))
    with torch.no_grad():
        assert module(torch.randn(1, 3, 224, 224)).shape == (1, 196, 8)
    assert sizes == [(56 * 56, 147), (28 * 28, 576), (14 * 14, 576)]
    assert module.grid_size == (14, 14)
    assert module.feat_ratio() == 16


def test_many_rows_of_unit_variance_approach_softmax_and_the_layers_own_do_not():
    torch.manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, 48, 64) for _ in range(3))
    exact = (q @ k.mT).softmax(-1) @ v

    def error(rows: int, length: float) -> float:
        blocks = [torch.linalg.qr(torch.randn(64, 64))[0] for _ in range(max(rows // 64, 1))]
        w = torch.cat(blocks)[:rows] * length
        return float((performer_attention(q, k, v, w) - exact).norm() / exact.norm())

    assert error(4096, 64**0.5) < 0.04
    assert error(32, 32**0.5) > 0.04


def test_performer_weights_are_positive_and_sum_to_one_also_for_long_keys():
    torch.manual_seed(0)
    layer = PerformerLayer(64)
    for scale in (0.1, 1.0, 40.0):
        q, k = scale * torch.randn(2, 9, 64), scale * torch.randn(2, 9, 64)
        phi_q, phi_k = positive_features(q, layer.w, (2,)), positive_features(k, layer.w, (1, 2))
        assert (phi_q >= 0).all()
        assert torch.isfinite(phi_q).all()
        assert phi_k.amax((1, 2)).allclose(torch.full((2,), 1 / math.sqrt(32)))
    ones = performer_attention(0.5 * torch.randn(2, 9, 64), 0.5 * torch.randn(2, 9, 64), torch.ones(2, 9, 1), layer.w)
    close(ones, torch.ones(2, 9, 1))
    close(layer.w @ layer.w.T, 32 * torch.eye(32), 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(layer(1e3 * torch.randn(1, 9, 64))).all()


def test_the_scale_of_the_token_layer_is_that_of_its_input():
    torch.manual_seed(0)
    layer = TransformerLayer(576)
    layer.qkv.weight.data *= 10
    x = torch.randn(1, 12, 576)
    found = layer(x)
    close(found[0], token_layer(layer, x[0]))
    layer.scale = 64**-0.5
    assert (layer(x) - found).abs().max() > 1e-2


def test_training_never_moves_the_table():
    model = small()
    assert "pos_embed" not in [name for name, p in model.named_parameters() if p.requires_grad]
    before = model.pos_embed.detach().clone()
    model.requires_grad_(True)  # what full fine-tuning does
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before)
    assert torch.equal(before[0, :, 0], torch.arange(17).double().sin().float())


def test_another_size_makes_the_table_anew():
    model, fresh = small(), small(img_size=(96, 64))
    model.set_input_size((96, 64))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 64)
    assert torch.equal(model.pos_embed, sinusoids(25, 32))
    assert not model.pos_embed.requires_grad
    close(model.eval()(x), fresh.eval()(x), 1e-6)
    dynamic = small(dynamic_img_size=True).eval()
    dynamic.load_state_dict(small().state_dict())
    close(dynamic(x), model(x), 1e-5)


def test_qk_scale_of_released_weights():
    plain = small().eval()
    x = torch.randn(2, 3, 64, 64)
    same = small(qk_scale=16**-0.5).eval()
    close(same(x), plain(x), 1e-6)
    other = small(qk_scale=32**-0.5).eval()
    for block in plain.blocks:
        block.attn.qkv.weight.data[:32] *= 0.5**0.5
    close(other(x), plain(x), 1e-6)
    assert same.state_dict().keys() == plain.state_dict().keys()


def test_bad_input_names_the_numbers():
    with pytest.raises(BackboneError, match="100x64 pixels: T2T-ViT needs sides that are multiples of 16"):
        small(dynamic_img_size=True)(torch.zeros(1, 3, 100, 64))
    with pytest.raises(BackboneError, match="96x64 pixels: the model was built for 64x64"):
        small()(torch.zeros(1, 3, 96, 64))
    with pytest.raises(BackboneError, match="tokens_type 'conv' is unknown: expected one of performer, transformer"):
        small(tokens_type="conv")
    with pytest.raises(BackboneError, match="patch_size 8"):
        small(patch_size=8)
