import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import foveal.architectures  # noqa: F401
from foveal.backbones.adapter import DEFAULT, imagenet_classifier, load_backbone
from foveal.backbones.weights import shipped_file
from foveal.data.images import to_pixels
from foveal.data.photos import photos
from foveal.data.worlds import KINDS

TINY = ("vit_hybrid_foveal", {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2})


def looks(size: int) -> Tensor:
    """Photos and procedural pictures as normalised images [n, 3, size, size]."""
    backbone = load_backbone("vit", offline=True, size=size)
    from PIL import Image

    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(np.rint(kind(size, rng).clip(0, 1) * 255).astype(np.uint8)) for kind in KINDS]
    pixels = np.stack([to_pixels(each, backbone.preprocessing) for each in [*photos().values(), *drawn]])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def test_the_tokens_are_the_trunks_places_seen_by_plain_blocks():
    torch.manual_seed(0)
    model = timm.create_model(TINY[0], num_classes=3, **TINY[1]).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (trunk,) = model.patch_embed.backbone(x)
        assert trunk.shape == (2, 320, 2, 2)
        weight, bias = model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
        tokens = trunk.flatten(2).transpose(1, 2) @ weight.T + bias
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1) + model.pos_embed
        for block in model.blocks:
            h = F.layer_norm(tokens, (32,), block.norm1.weight, block.norm1.bias, 1e-6)
            q, k, v = (h @ block.attn.qkv.weight.T + block.attn.qkv.bias).unflatten(2, (3, 2, 16)).unbind(2)
            a = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(16**-0.5).softmax(-1)
            mixed = torch.einsum("bhnm,bmhd->bnhd", a, v).flatten(2)
            tokens = tokens + mixed @ block.attn.proj.weight.T + block.attn.proj.bias
            h = F.layer_norm(tokens, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
            h = F.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
            tokens = tokens + h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        v = F.layer_norm(tokens[:, 0], (32,), model.norm.weight, model.norm.bias, 1e-6)
        torch.testing.assert_close(model(x), v @ model.head.weight.T + model.head.bias, atol=1e-5, rtol=1e-5)


def test_its_weights_come_with_foveal_under_a_short_name():
    file = shipped_file("vit_hybrid_foveal")
    assert file is not None
    assert file.stat().st_size <= 12_000_000
    short, long = load_backbone("vit", offline=True), load_backbone("vit_hybrid_foveal", offline=True)
    assert short.fingerprint() == long.fingerprint()
    assert (short.plan.arch, short.plan.name, short.width) == ("vit_hybrid_foveal", "vit_hybrid_foveal", 192)


def test_the_trunk_is_the_teachers_to_half_precision():
    ours = load_backbone("vit", offline=True).model.patch_embed.backbone.state_dict()
    theirs = load_backbone(DEFAULT, offline=True).model.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].half().to(tensor.dtype))


def test_its_classifier_knows_a_cat_and_a_cup_of_coffee():
    classifier = imagenet_classifier("vit", offline=True)
    shown = photos(("chelsea", "coffee"))
    pixels = np.stack([to_pixels(each, classifier.backbone.preprocessing) for each in shown.values()])
    with torch.no_grad():
        cat, coffee = classifier((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5).argmax(1)
    assert int(cat) in (281, 282, 285)
    assert int(coffee) == 967


@pytest.mark.parametrize("size", [224, 160])
def test_what_looks_alike_to_the_teacher_does_to_it(size: int):
    x = looks(size)
    with torch.no_grad():
        seen = {name: load_backbone(name, offline=True, size=size)(x) for name in ("vit", DEFAULT)}
    near = [F.normalize(each, dim=1) @ F.normalize(each, dim=1).T for each in seen.values()]
    pairs = torch.triu_indices(len(x), len(x), 1).unbind()
    assert torch.corrcoef(torch.stack([each[pairs] for each in near]))[0, 1] > 0.4  # -0.1 before it was taught
