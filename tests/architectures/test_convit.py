import copy
import itertools
import math
import warnings

import pytest
import timm
import torch
from torch import Tensor

import foveal.architectures  # noqa: F401
from foveal.architectures.convit import GatedAttention, Locality, attention_distance, locality, localize
from foveal.core.errors import BackboneError

TINY = ("convit_tiny_plus", {"img_size": 64, "embed_dim": 8, "depth": 4, "local_up_to_layer": 3})


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def small_vit(**more):
    torch.manual_seed(0)
    args = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **{**args, **more})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model.eval()


def layer(heads=4, grid=(2, 3), d=3, strength=1.0, gate=0.3) -> GatedAttention:
    torch.manual_seed(1)
    made = GatedAttention(heads * d, heads, grid, qkv_bias=True, locality_strength=strength, gate=gate)
    for name, parameter in made.named_parameters():
        if name.startswith(("qk", "v", "proj")):
            torch.nn.init.normal_(parameter, 0, 0.5)
    return made


def only_position(made: GatedAttention) -> GatedAttention:
    """Values and output the identity, all attention on positions."""
    dim = made.v.in_features
    made.load_state_dict(
        {
            **made.state_dict(),
            "gating_param": torch.full((made.num_heads,), math.inf),
            **{f"{name}.weight": torch.eye(dim) for name in ("v", "proj")},
            **{f"{name}.bias": torch.zeros(dim) for name in ("v", "proj")},
        }
    )
    return made


@pytest.mark.parametrize(
    ("name", "count"), [("tiny", 5_710_512), ("small", 27_777_322), ("base", 86_540_040), ("tiny_plus", 9_972_912)]
)
def test_counts_of_timms_sizes_and_heads_of_64(name: str, count: int):
    with torch.device("meta"):
        model = timm.create_model(f"convit_{name}")
    assert sum(p.numel() for p in model.parameters()) == count
    assert type(model).__name__ == ("ConViT" if "plus" in name else "ConVit")
    assert sum(key.endswith("gating_param") for key in model.state_dict()) == 10


def test_on_a_square_it_is_timms_convit_gradients_too():
    found = []
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 6, "depth": 3, "local_up_to_layer": 2, "num_classes": 5}
    timms = timm.create_model("convit_small", qkv_bias=True, **args)
    for parameter in timms.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    ours = timm.create_model("convit_small_plus", qkv_bias=True, **args)
    ours.load_state_dict(timms.state_dict())
    for model in (timms, ours):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        grads = {key: p.grad for key, p in model.named_parameters()}
        found.append((y.detach(), x.grad, grads))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1], 1e-4)
    for key, gradient in found[0][2].items():
        close(found[1][2][key], gradient, 1e-4)


def naive(made: GatedAttention, x: Tensor) -> Tensor:
    """Every image, head and pair of patches by itself, as the equations read."""
    height, width = made.grid
    places = list(itertools.product(range(height), range(width)))
    d = x.shape[2] // made.num_heads
    images = []
    for tokens in x:
        qk, v = made.qk(tokens), made.v(tokens)
        outs = []
        for h in range(made.num_heads):
            q, k = qk[:, h * d : (h + 1) * d], qk[:, x.shape[2] + h * d : x.shape[2] + (h + 1) * d]
            share = torch.sigmoid(made.gating_param[h])
            rows = []
            for i, (y, z) in enumerate(places):
                content = torch.stack([q[i] @ k[j] / d**0.5 for j in range(len(places))]).softmax(0)
                r = torch.tensor([[a - z, b - y, (a - z) ** 2 + (b - y) ** 2] for b, a in places]).float()
                position = (r @ made.pos_proj.weight[h] + made.pos_proj.bias[h]).softmax(0)
                row = (1 - share) * content + share * position
                rows.append((row / row.sum()) @ v[:, h * d : (h + 1) * d])
            outs.append(torch.stack(rows))
        images.append(made.proj(torch.cat(outs, 1)))
    return torch.stack(images)


@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_gated_attention_is_the_naive_one_gradients_too(grid):
    made = layer(grid=grid)
    torch.nn.init.normal_(made.pos_proj.weight, 0, 0.5)
    torch.nn.init.normal_(made.gating_param)
    found = []
    for run in (made, lambda x: naive(made, x)):
        x = torch.randn(2, math.prod(grid), 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
        made.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *[p.grad.clone() for p in made.parameters()]])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-4)


def test_attention_dropout_takes_the_same_attention():
    made = layer()
    x = torch.randn(2, 6, 12)
    expected = made.eval()(x)
    made.attn_drop.p = 1e-9
    close(made.train()(x), expected)
    made.attn_drop.p = 0.9
    assert not torch.allclose(made(x), expected, atol=1e-2)


def test_a_closed_gate_is_timms_attention():
    vit = small_vit(qk_norm=True)
    local = localize(vit, 2, gate=-math.inf)
    x = torch.randn(2, 16, 32)
    for index in range(2):
        close(local.blocks[index].attn(x), vit.blocks[index].attn(x), 1e-6)
    assert local.blocks[2].attn.state_dict().keys() == vit.blocks[2].attn.state_dict().keys()


def test_an_open_sharp_gate_is_a_convolution_that_picks_its_offset():
    height, width, d = 6, 7, 2
    made = only_position(layer(9, (height, width), d, strength=1e3))
    x = torch.randn(1, height * width, 9 * d)
    maps = x.transpose(1, 2).reshape(9, d, height, width)
    out = made(x).transpose(1, 2).reshape(9, d, height, width)
    for head in range(9):
        dx, dy = head // 3 - 1, head % 3 - 1
        picked = maps[head, :, 1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx]
        close(out[head, :, 1:-1, 1:-1], picked, 1e-6)


def test_four_heads_look_between_patches():
    made = only_position(layer(4, (5, 5), 1, strength=1e3))
    x = torch.randn(1, 25, 4)
    maps, out = (each.transpose(1, 2).reshape(4, 5, 5) for each in (x, made(x)))
    for head, (x0, y0) in enumerate(
        [(-1, -1), (-1, 0), (0, -1), (0, 0)]
    ):  # the square of patches around (+-1/2, +-1/2)
        mean = sum(maps[head, 1 + y : 4 + y, 1 + x : 4 + x] for y in (y0, y0 + 1) for x in (x0, x0 + 1)) / 4
        close(out[head, 1:-1, 1:-1], mean, 1e-6)


def test_rows_sum_to_one_and_a_sharp_head_is_as_far_as_its_offset():
    made = layer(9, (5, 6), 2, strength=1e3, gate=math.inf)
    attention = made.get_attention(torch.randn(2, 30, 18))
    close(attention.sum(-1), torch.ones(2, 9, 30), 1e-6)
    distance = attention_distance(attention, (5, 6)).reshape(2, 9, 5, 6)[..., 1:-1, 1:-1]
    offsets = torch.tensor([math.hypot(head // 3 - 1, head % 3 - 1) for head in range(9)])
    close(distance, offsets[None, :, None, None].expand_as(distance))
    close(layer().get_attention(torch.randn(2, 6, 12)).sum(-1), torch.ones(2, 4, 6), 1e-6)


def test_gates_learn_from_the_first_step():
    made = layer()
    made(torch.randn(2, 6, 12)).square().sum().backward()
    assert bool((made.gating_param.grad.abs() > 1e-6).all())


def test_a_sharper_start_looks_nearer():
    vit = small_vit(img_size=128, num_heads=4)
    means = []
    for strength in (0.05, 0.2, 0.5, 1.0, 3.0):
        found = locality(localize(vit, 1, strength=strength), torch.randn(1, 3, 128, 128))
        means.append([each.start for each in found.heads if each.layer == 0])
    for nearer, farther in zip(means[1:], means[:-1], strict=True):
        assert all(a < b for a, b in zip(nearer, farther, strict=True))


def by_hand(local, x: Tensor, n: int) -> Tensor:
    """Patches alone through the first blocks, prefix tokens joined behind them."""
    tokens = local.norm_pre(local._pos_embed(local.patch_embed(x)))
    prefix, patches = tokens[:, : local.num_prefix_tokens], tokens[:, local.num_prefix_tokens :]
    for block in local.blocks[:n]:
        patches = patches + block.ls1(naive(block.attn, block.norm1(patches)))
        patches = patches + block.ls2(block.mlp(block.norm2(patches)))
    tokens = torch.cat([prefix, patches], 1)
    for block in local.blocks[n:]:
        tokens = block(tokens)
    return local.head(local.fc_norm(local.pool(local.norm(tokens))))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"init_values": 0.5, "pre_norm": True, "global_pool": "avg"},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_prefix_tokens_join_after_the_gated_blocks(more):
    vit = small_vit(**more)
    before = copy.deepcopy(vit.state_dict())
    local = localize(vit, 2, strength=0.7)
    x = torch.randn(2, 3, 64, 64)
    close(local(x), by_hand(local, x, 2), 1e-4)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert type(vit).__name__ == "VisionTransformer"
    assert sum(p.numel() for p in local.parameters()) - sum(p.numel() for p in vit.parameters()) == 2 * 4 * 5
    other = localize(small_vit(**more), 2)
    other.load_state_dict(local.state_dict())
    assert torch.equal(other(x), local(x))


def test_oblong_images_of_10_by_14_patches():
    local = localize(small_vit(img_size=(160, 224), num_heads=1), 1)
    assert local.blocks[0].attn.grid == (10, 14)
    x = torch.randn(1, 3, 160, 224)
    close(local(x), by_hand(local, x, 1), 1e-4)
    assert locality(local, x).grid == (10, 14)
    tokens, maps = local.forward_intermediates(x)
    assert [tuple(each.shape) for each in maps] == [(1, 32, 10, 14)] * 3
    close(tokens, local.forward_features(x))


def test_a_change_of_resolution_makes_new_offsets():
    dynamic = localize(small_vit(dynamic_img_size=True), 2)
    for height, width in ((64, 64), (96, 64), (64, 96)):
        x = torch.randn(1, 3, height, width)
        out = dynamic(x)
        assert dynamic.blocks[1].attn.grid == (height // 16, width // 16)
        close(out, by_hand(dynamic, x, 2), 1e-4)
    fixed = localize(small_vit(), 2)
    fixed.set_input_size((96, 64))
    close(fixed(x := torch.randn(1, 3, 96, 64)), by_hand(fixed, x, 2), 1e-4)


def test_a_convit_takes_another_size():
    torch.manual_seed(0)
    model = timm.create_model(TINY[0], num_classes=3, **{**TINY[1], "img_size": (32, 48)}).eval()
    assert model.blocks[0].attn.grid == (2, 3)
    model.set_input_size((48, 32))
    x = torch.randn(1, 3, 48, 32)
    tokens = model.patch_embed(x) + model.pos_embed
    for block in model.blocks[:3]:
        tokens = tokens + naive(block.attn, block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    tokens = model.blocks[3](torch.cat([model.cls_token, tokens], 1))
    close(model(x), model.head(model.norm(tokens)[:, 0]), 1e-4)


def test_without_positions_the_prefix_tokens_keep_theirs():
    vit = small_vit(reg_tokens=2)
    local = localize(vit, 2, keep_positions=False)
    assert local.pos_embed is None
    x = torch.randn(1, 3, 64, 64)
    embedded = local._pos_embed(local.patch_embed(x))
    close(embedded[:, :3], vit._pos_embed(vit.patch_embed(x))[:, :3])
    close(embedded[:, 3:], vit.patch_embed(x))
    close(local(x), by_hand(local, x, 2), 1e-4)


def test_the_report_is_what_a_loop_finds():
    vit = small_vit(img_size=(32, 48), qk_norm=True)
    local = localize(vit, 2, strength=0.4, gate=0.5).train()
    torch.nn.init.normal_(local.blocks[1].attn.gating_param)
    x = torch.randn(3, 3, 32, 48)
    found = locality(local, x)
    assert isinstance(found, Locality)
    assert (found.grid, found.images, len(found.heads)) == ((2, 3), 3, 3 * 4)
    assert local.training
    assert not any(module._forward_hooks for module in local.modules())
    probe = copy.deepcopy(local).eval().requires_grad_(False)
    places = list(itertools.product(range(2), range(3)))
    tokens = probe._pos_embed(probe.patch_embed(x))
    for number, block in enumerate(probe.blocks):
        y = block.norm1(tokens[:, 1:] if number < 2 else tokens)
        if number < 2:
            attention = block.attn.get_attention(y)
        else:
            q, k, _ = block.attn.qkv(y).reshape(3, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
            scores = block.attn.q_norm(q) @ block.attn.k_norm(k).transpose(2, 3) / 8**0.5
            attention = scores[:, :, 1:, 1:].softmax(-1)
        for head in range(4):
            distance, entropy = 0.0, 0.0
            for image, i, j in itertools.product(range(3), range(6), range(6)):
                share = float(attention[image, head, i, j])
                distance += share * math.dist(places[i], places[j]) / 18
                entropy -= share * math.log(share) / 18
            row = found.heads[4 * number + head]
            assert (row.layer, row.head) == (number, head)
            assert row.distance == pytest.approx(distance, abs=1e-4)
            assert row.entropy == pytest.approx(entropy, abs=1e-4)
            gate = None if number == 2 else float(block.attn.gating_param[head].sigmoid())
            assert row.gate == pytest.approx(gate)
        tokens = block(tokens)
    gates = [float(block.attn.gating_param.sigmoid().mean()) for block in probe.blocks[:2]]
    assert found.gates() == pytest.approx(gates)


def test_the_start_is_the_same_net_untrained():
    torch.manual_seed(0)
    model = timm.create_model(TINY[0], **TINY[1]).eval()
    with torch.no_grad():
        for block in model.blocks[:3]:
            block.attn.qk.weight.zero_()  # content attention alike everywhere
    x = torch.randn(2, 3, 64, 64)
    alone = locality(model, x)
    for row in alone.heads[:12]:
        assert row.start == pytest.approx(row.distance, abs=1e-5)
    assert alone.heads[12].gate is alone.heads[12].start is None
    trained = copy.deepcopy(model)
    trained.blocks[0].attn.gating_param.data.fill_(-3.0)
    both = locality(trained, x, start=model)
    assert [row.start for row in both.heads] == [row.distance for row in alone.heads]
    assert both.heads[0].distance > both.heads[0].start
    table = str(both).splitlines()
    assert table[0] == "2 images, 4x4 patches; distances in patches, entropy in nats up to 2.77"
    assert table[1].split() == ["layer", "head", "gate", "distance", "at", "start", "entropy"]
    assert table[2].split()[:3] == ["0", "0", "0.05"]
    assert table[-1].split()[:3] == ["3", "3", "-"]
    assert len({len(line) for line in table[1:]}) == 1


def test_the_report_reads_timms_own_convit():
    torch.manual_seed(0)
    args = {"img_size": 64, "patch_size": 16, "embed_dim": 8, "depth": 3, "local_up_to_layer": 2}
    timms = timm.create_model("convit_tiny", **args)
    ours = timm.create_model("convit_tiny_plus", **args)
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(locality(timms, x).heads, locality(ours, x).heads, strict=True):
        assert a.distance == pytest.approx(b.distance, abs=1e-5)
        assert (a.start is None) == (b.start is None)
        assert a.start is None or a.start == pytest.approx(b.start, abs=1e-6)


def test_a_count_of_heads_that_is_no_square_is_told_and_centred():
    with pytest.warns(
        UserWarning, match="6 heads are no square: 4 start on a 2 x 2 grid of offsets, the other 2 on its"
    ):
        made = GatedAttention(12, 6, (3, 3))
    assert torch.equal(made.pos_proj.weight[4:].detach(), torch.tensor([[0.0, 0.0, -1.0]] * 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GatedAttention(12, 4, (3, 3))


def test_bad_input_names_the_numbers():
    vit = small_vit()
    with pytest.raises(BackboneError, match="15 tokens on a grid of 4x4 = 16 patches"):
        localize(vit, 1).blocks[0].attn(torch.zeros(1, 15, 32))
    with pytest.raises(
        BackboneError, match="n_layers 3 of 3 blocks: expected 1 to 2, 1 prefix token must have a block"
    ):
        localize(vit, 3)
    with pytest.raises(BackboneError, match="locality strength 0"):
        localize(vit, 1, strength=0)
    with pytest.raises(BackboneError, match="timm's VisionTransformer, not VisionTransformerDistilled"):
        localize(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=32, num_heads=4))
    with pytest.raises(BackboneError, match="block 0 is Block with DiffAttention"):
        localize(timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=4, attn_layer="diff"), 1)
    with pytest.raises(BackboneError, match="drops patches at random"):
        localize(small_vit(patch_drop_rate=0.5), 1)
    with pytest.raises(BackboneError, match="gated attention looks at every patch"):
        localize(vit, 1)(torch.zeros(1, 3, 64, 64), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(BackboneError, match="VisionTransformer has no gated attention"):
        locality(vit, torch.zeros(1, 3, 64, 64))
    with pytest.raises(BackboneError, match="other layers, heads or patches"):
        locality(localize(vit, 1), torch.zeros(1, 3, 64, 64), start=timm.create_model(TINY[0], **TINY[1]))
    with pytest.raises(BackboneError, match="5 heads do not divide 12 channels"):
        GatedAttention(12, 5, (2, 2))
    with pytest.raises(BackboneError, match="local_up_to_layer 10 of 4 blocks"):
        timm.create_model("convit_tiny_plus", depth=4)
