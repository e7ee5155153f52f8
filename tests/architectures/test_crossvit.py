import copy
import math

import pytest
import timm
import torch
from timm.models.crossvit import CrossVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import foveal.architectures  # noqa: F401
from foveal.architectures.crossvit import CrossTokenFusion, FusedPair, branch_attention
from foveal.core.errors import BackboneError

TINY = (
    "crossvit_pair_tiny_224",
    {
        "img_size": 64,
        "patch_size": (8, 16),
        "embed_dim": (16, 24),
        "depth": (2, 4),
        "num_heads": (2, 2),
        "every": (1, 2),
    },
)

PUBLISHED = {
    "crossvit_tiny_240": 7_014_800,
    "crossvit_small_240": 26_856_272,
    "crossvit_base_240": 105_025_232,
    "crossvit_9_240": 8_553_296,
    "crossvit_15_240": 27_528_464,
    "crossvit_18_240": 43_271_408,
    "crossvit_9_dagger_240": 8_776_592,
    "crossvit_15_dagger_240": 28_209_008,
    "crossvit_18_dagger_240": 44_266_976,
    "crossvit_15_dagger_408": 28_500_080,
    "crossvit_18_dagger_408": 44_606_560,
}
SCHEMES = ("cross", "all", "class", "pairwise")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", PUBLISHED)
def test_timms_models_are_the_papers(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def fusion(scheme, dim_a=6, dim_b=8, heads=2) -> CrossTokenFusion:
    torch.manual_seed(0)
    made = CrossTokenFusion(dim_a, dim_b, heads, scheme)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.5)
    return made


def tokens(n: int = 16, m: int = 4, dim_a: int = 6, dim_b: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 1 + n, dim_a, requires_grad=True), torch.randn(2, 1 + m, dim_b, requires_grad=True)


def norm(v: Tensor, layer) -> Tensor:
    return (v - v.mean()) / (v.var(unbiased=False) + 1e-6).sqrt() * layer.weight + layer.bias


def project(v: Tensor, layers) -> Tensor:
    """One token through LN, GELU and Linear, or untouched."""
    if isinstance(layers, torch.nn.Identity):
        return v
    h = norm(v, layers[0])
    return layers[2].weight @ (h * (1 + torch.erf(h / math.sqrt(2))) / 2) + layers[2].bias


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], heads: int) -> list[Tensor]:
    """Softmax attention of each query over all keys, head by head, key by key."""
    size = len(q[0]) // heads
    out = []
    for one in q:
        parts = []
        for s in (slice(h * size, (h + 1) * size) for h in range(heads)):
            scores = [(one[s] @ key[s] / math.sqrt(size)).exp() for key in k]
            parts.append(sum(score * value[s] for score, value in zip(scores, v, strict=True)) / sum(scores))
        out.append(torch.cat(parts))
    return out


def naive_cross(made: CrossTokenFusion, a: Tensor, b: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """One image: tokens [1 + N, D], one after another."""
    out = []
    for i, (own, other) in enumerate(((a, b), (b, a))):
        block = made.fusion[i]
        z = project(own[0], made.projs[i])
        sequence = [norm(x, block.norm1) for x in (z, *other[1:])]
        linear = lambda layer, x: layer.weight @ x + layer.bias  # noqa: E731
        keys = [linear(block.attn.wk, x) for x in sequence]
        values = [linear(block.attn.wv, x) for x in sequence]
        (read,) = attend([linear(block.attn.wq, sequence[0])], keys, values, heads)
        first = project(z + linear(block.attn.proj, read), made.revert_projs[i])
        out.append(torch.stack([first, *own[1:]]))
    return out[0], out[1]


def naive_all(made: CrossTokenFusion, a: Tensor, b: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    block = made.fusion[0]
    y = [project(x, made.projs[0]) for x in a] + [project(x, made.projs[1]) for x in b]
    qkv = [(block.attn.qkv.weight @ norm(x, block.norm1) + block.attn.qkv.bias).chunk(3) for x in y]
    read = attend(*[[row[part] for row in qkv] for part in range(3)], heads)
    y = [x + block.attn.proj.weight @ r + block.attn.proj.bias for x, r in zip(y, read, strict=True)]
    g = made.revert_projs
    return (
        torch.stack([project(x, g[0]) for x in y[: len(a)]]),
        torch.stack([project(x, g[1]) for x in y[len(a) :]]),
    )


def naive_class(made: CrossTokenFusion, a: Tensor, b: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    total = project(a[0], made.projs[0]) + project(b[0], made.projs[1])
    g = made.revert_projs
    return torch.stack([project(total, g[0]), *a[1:]]), torch.stack([project(total, g[1]), *b[1:]])


def naive_pairwise(made: CrossTokenFusion, a: Tensor, b: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """A patch is summed with the other branch's map read at its centre, bilinearly."""
    y = [[project(x, made.projs[i]) for x in own] for i, own in enumerate((a, b))]
    out = []
    for i in (0, 1):
        own, other = y[i], y[1 - i]
        side, across = math.isqrt(len(own) - 1), math.isqrt(len(other) - 1)
        rows = [own[0] + other[0]]
        for place in range(side * side):
            at = [max((p + 0.5) * across / side - 0.5, 0.0) for p in divmod(place, side)]
            low = [int(p) for p in at]
            high = [min(p + 1, across - 1) for p in low]
            share = [p - q for p, q in zip(at, low, strict=True)]
            read = sum(
                wr * wc * other[1 + r * across + c]
                for r, wr in ((low[0], 1 - share[0]), (high[0], share[0]))
                for c, wc in ((low[1], 1 - share[1]), (high[1], share[1]))
            )
            rows.append(own[1 + place] + read)
        out.append(torch.stack([project(x, made.revert_projs[i]) for x in rows]))
    return out[0], out[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fusion_is_the_naive_one_gradients_too(scheme: str):
    naive = {"cross": naive_cross, "all": naive_all, "class": naive_class, "pairwise": naive_pairwise}[scheme]
    made = fusion(scheme)
    found = []

    def one_by_one(a: Tensor, b: Tensor) -> list[Tensor]:
        pairs = [naive(made, x, y, 2) for x, y in zip(a, b, strict=True)]
        return [torch.stack([pair[i] for pair in pairs]) for i in (0, 1)]

    for run in (made, one_by_one):
        made.zero_grad()
        a, b = tokens()
        out_a, out_b = run(a, b)
        (out_a.square().sum() + (out_b * out_b.detach().cos()).sum()).backward()
        found.append([out_a, out_b, a.grad, b.grad, *[p.grad.clone() for p in made.parameters()]])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scheme", ["cross", "class"])
def test_patches_stay_bit_by_bit(scheme: str):
    a, b = tokens()
    out_a, out_b = fusion(scheme)(a, b)
    assert torch.equal(out_a[:, 1:], a[:, 1:])
    assert torch.equal(out_b[:, 1:], b[:, 1:])
    assert not torch.equal(out_a[:, 0], a[:, 0])


def test_a_class_token_depends_on_the_others_patches_and_not_on_its_class_token():
    a, b = tokens()
    fusion("cross")(a, b)[0][:, 0].square().sum().backward()
    assert b.grad is not None
    assert (b.grad[:, 1:].abs().sum(2) > 0).all()
    assert torch.equal(b.grad[:, 0], torch.zeros_like(b.grad[:, 0]))
    assert a.grad is not None
    assert (a.grad[:, 0].abs().sum(1) > 0).all()
    assert not a.grad[:, 1:].any()


def test_without_the_attentions_projection_nothing_comes_from_the_other_branch():
    made = fusion("cross")
    for block in made.fusion:
        block.attn.proj.weight.data.zero_()
    a, b = tokens()
    first, other = made(a, b)[0], made(a, torch.randn_like(b))[0]
    assert torch.equal(first, other)
    assert (first[:, 0] - a[:, 0]).abs().max() > 0.1, "it is not an identity either"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_macs_are_those_that_torch_counts(scheme: str):
    made, counted = fusion(scheme, 24, 32, 4).eval(), []
    if scheme == "all":
        made.fusion[0].attn.fused_attn = False
    for m in (16, 64, 256):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            made(*(x[:1].detach() for x in tokens(16, m, 24, 32)))
        counted.append(counter.get_total_flops() // 2)
        assert made.macs(17, 1 + m) == counted[-1]
    slopes = [(counted[i + 1] - counted[i]) / (48, 192)[i] for i in (0, 1)]
    if scheme == "all":
        assert slopes[1] > slopes[0]
    else:
        assert slopes[1] == slopes[0], "linear in the number of patches"


def vit(patch: int, dim: int, depth: int, size: int = 32, **more) -> VisionTransformer:
    torch.manual_seed(dim)
    args = {"num_heads": 2, "num_classes": 5, "mlp_ratio": 3.0, **more}
    return VisionTransformer(img_size=size, patch_size=patch, embed_dim=dim, depth=depth, **args).eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_without_fusion_it_is_the_mean_of_two_vits_which_stay_as_they_were(pool: str):
    a, b = vit(4, 16, 2, global_pool=pool), vit(8, 24, 4, global_pool=pool)
    before = [copy.deepcopy(each.state_dict()) for each in (a, b)]
    pair = FusedPair(a, b, every=(1, 2), scheme=None)
    close(pair(images()), (a(images()) + b(images())) / 2, 1e-6)
    assert sum(p.numel() for p in pair.parameters()) == sum(p.numel() for each in (a, b) for p in each.parameters())
    for parameter in pair.parameters():
        parameter.data.zero_()
    for each, state in zip((a, b), before, strict=True):
        assert each.num_classes == each.head.out_features == 5
        assert all(torch.equal(value, state[key]) for key, value in each.state_dict().items())


def crossvit() -> CrossVit:
    torch.manual_seed(4)
    return CrossVit(
        img_size=48,
        img_scale=(1.0, 32 / 48),
        patch_size=(12, 16),
        embed_dim=(16, 32),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(2, 2),
        mlp_ratio=(3, 3, 1),
        num_classes=5,
    ).eval()


def as_pair(model: CrossVit) -> FusedPair:
    """Two plain ViTs and fusions with the weights of timm's CrossViT."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    with pytest.warns(UserWarning, match="resized twice: to 48x48 pixels for the pair, and from those to 32x32"):
        pair = FusedPair(vit(12, 16, 2, 48), vit(16, 32, 4, 32), every=(1, 2))
    state = {}
    for key, value in model.state_dict().items():
        for i, name in enumerate("ab"):
            for whole in ("pos_embed", "cls_token"):
                if key == f"{whole}_{i}":
                    state[f"{name}.{whole}"] = value
            for part, to in (
                ("patch_embed", f"{name}.patch_embed"),
                ("norm", f"{name}.norm"),
                ("head", f"head.{name}"),
            ):
                if key.startswith(f"{part}.{i}."):
                    state[key.replace(f"{part}.{i}", to)] = value
            for stage in (0, 1):
                for block in range((1, 2)[i]):
                    start = f"blocks.{stage}.blocks.{i}.{block}."
                    if key.startswith(start):
                        state[f"{name}.blocks.{stage * (1, 2)[i] + block}." + key.removeprefix(start)] = value
        for stage in (0, 1):
            if key.startswith(f"blocks.{stage}.") and not key.startswith(f"blocks.{stage}.blocks."):
                state[key.replace(f"blocks.{stage}", f"fusions.{stage}", 1)] = value
    assert len(state) == len(model.state_dict())
    pair.load_state_dict(state)
    return pair.eval()


def test_two_vits_with_the_weights_of_timms_crossvit_answer_as_it_does():
    model = crossvit()
    pair = as_pair(model)
    close(pair(images(48)), model(images(48)), 1e-4)
    for x, y in zip(pair.forward_features(images(48)), model.forward_features(images(48)), strict=True):
        close(x, y)
    _, mine = pair.forward_intermediates(images(48))
    _, timms = model.forward_intermediates(images(48))
    for x, y in zip(mine, timms, strict=True):
        close(x, y)


def test_what_class_tokens_read_sums_to_one_on_pairs_and_on_timms_models():
    model = crossvit()
    mine, timms = (branch_attention(each, images(48)) for each in (as_pair(model), model))
    assert [(each.stage, each.branch, each.grid) for each in mine] == [
        (stage, branch, grid) for stage in (0, 1) for branch, grid in ((0, (2, 2)), (1, (4, 4)))
    ]
    for x, y in zip(mine, timms, strict=True):
        assert x.weights.shape == (2, 2, 1 + math.prod(x.grid))
        close(x.weights.sum(2), torch.ones(2, 2), 1e-5)
        close(x.weights, y.weights)
        assert torch.equal(x.maps.flatten(2), x.weights[:, :, 1:])
        assert (x.grid, x.stage, x.branch) == (y.grid, y.stage, y.branch)


def test_reading_leaves_nothing_on_the_model_also_after_a_crash():
    pair = FusedPair(vit(4, 16, 2), vit(8, 24, 2), every=1)
    branch_attention(pair, images())
    with pytest.raises(RuntimeError):
        branch_attention(pair, images()[:, :2])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pair.modules())


def test_registers_stay_where_patches_are_summed_and_are_read_by_class_tokens():
    pairwise = FusedPair(vit(4, 16, 1, reg_tokens=3), vit(8, 24, 1, reg_tokens=2), every=1, scheme="pairwise")
    a, b = (torch.randn(2, n, d) for n, d in ((68, 16), (19, 24)))
    fused: CrossTokenFusion = pairwise.fusions[0]  # pyright: ignore[reportAssignmentType]
    out_a, out_b = fused(a, b, [(8, 8), (4, 4)])
    assert torch.equal(out_a[:, 1:4], a[:, 1:4])
    assert torch.equal(out_b[:, 1:3], b[:, 1:3])
    close(out_a[:, [0, *range(4, 68)]], fused(a[:, [0, *range(4, 68)]], b[:, [0, *range(3, 19)]])[0], 1e-5)
    cross = FusedPair(vit(4, 16, 1, reg_tokens=3), vit(8, 24, 1, reg_tokens=2), every=1)
    first, second = branch_attention(cross, images())
    assert first.weights.shape == (2, 2, 1 + 2 + 16)
    assert first.maps.shape == (2, 2, 4, 4)
    assert second.maps.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_pair_adds(scheme):
    pair = FusedPair(vit(4, 16, 2), vit(8, 24, 4), every=(1, 2), scheme=scheme)
    plain = FusedPair(vit(4, 16, 2), vit(8, 24, 4), every=(1, 2), scheme=None)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert pair.added() == {
        "parameters": count(pair) - count(plain),
        "macs": 2 * CrossTokenFusion(16, 24, 2, scheme).macs(65, 17),
    }
    assert plain.added() == {"parameters": 0, "macs": 0}
    named = [timm.create_model(TINY[0], **TINY[1], scheme=each) for each in (scheme, "none")]
    assert count(named[0]) - count(named[1]) == named[0].added()["parameters"] == pair.added()["parameters"]
    x = images()
    assert (pair(x) - plain(x)).abs().max() > 1e-4


def test_other_sizes():
    pair = FusedPair(vit(4, 16, 2), vit(8, 24, 2), every=1, scheme="pairwise").eval()
    with pytest.raises(BackboneError, match="image of 48x48 pixels: the pair was built for 32x32"):
        pair(images(48))
    pair.set_input_size((48, 32))
    assert pair.img_size == (48, 32)
    assert [tuple(x.shape[1:]) for x in pair.forward_features(images(48)[..., :32])] == [(97, 16), (25, 24)]
    with pytest.raises(BackboneError, match="44x44 pixels are no whole number of patches of 8x8"):
        pair.set_input_size(44)
    assert pair.img_size == (48, 32)
    free = [vit(4, 16, 2, dynamic_img_size=True), vit(8, 24, 2, dynamic_img_size=True)]
    dynamic = FusedPair(*free, every=1, scheme="pairwise").eval()
    assert dynamic(images(40)).shape == (2, 5)
    plain = FusedPair(*free, every=1, scheme=None)
    close(plain(images(40)), (free[0](images(40)) + free[1](images(40))) / 2, 1e-6)
    with pytest.raises(BackboneError, match="44x44 pixels are no whole number of patches of 8x8"):
        dynamic(images(44))


def test_timm_knows_which_images_a_pair_of_its_models_expects():
    vits = [
        timm.create_model(name, depth=1, num_classes=3) for name in ("vit_tiny_patch16_224", "vit_small_patch32_224")
    ]
    pair = FusedPair(*vits, every=1)
    data = timm.data.resolve_model_data_config(pair)
    assert (data["input_size"], data["mean"], data["std"]) == ((3, 224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pair.default_cfg["num_classes"] == pair.num_classes == 3
    assert not pair.default_cfg.get("hf_hub_id"), "the weights of one branch are not the pair's"


def test_features_come_branch_by_branch_the_finer_first():
    pair = FusedPair(vit(8, 24, 2), vit(4, 16, 2), every=1).eval()
    assert [(each["reduction"], each["num_chs"]) for each in pair.feature_info] == [(4, 16)] * 2 + [(8, 24)] * 2
    final, maps = pair.forward_intermediates(images(), norm=True)
    assert [tuple(each.shape[1:]) for each in maps] == [(16, 8, 8)] * 2 + [(24, 4, 4)] * 2
    close(maps[1].flatten(2).transpose(1, 2), final[1][:, 1:], 1e-6)
    (last,) = pair.forward_intermediates(images(), indices=[2], intermediates_only=True, output_fmt="NLC")
    assert pair.prune_intermediate_layers([2]) == [2]
    assert len(pair.a.blocks) == len(pair.b.blocks) == len(pair.fusions) == 1
    close(pair.forward_intermediates(images(), indices=[2], intermediates_only=True, output_fmt="NLC")[0], last, 1e-6)
    assert pair.num_classes == 0


def test_bad_input_names_the_numbers():
    a, b = vit(4, 16, 2), vit(8, 24, 2)
    with pytest.raises(BackboneError, match="3 heads do not divide both widths, 16 and 24: expected one of 1, 2, 4, 8"):
        CrossTokenFusion(16, 24, 3)
    with pytest.raises(BackboneError, match="scheme 'add': expected one of cross, all, class, pairwise"):
        CrossTokenFusion(16, 24, 2, "add")  # pyright: ignore[reportArgumentType]
    made = CrossTokenFusion(6, 8, 2)
    x, y = tokens()
    for given in ((x, y[:1]), (y, x), (x[:, :1], y), (x[0], y)):
        with pytest.raises(BackboneError, match=r"expected \[B, 1 \+ N, 6\] and \[B, 1 \+ M, 8\] with one batch size"):
            made(*given)
    with pytest.raises(BackboneError, match="16 and 3 patches are not squares: give grids"):
        fusion("pairwise")(x, y[:, :4])
    with pytest.raises(BackboneError, match="4 tokens beside the class token for a grid of 3x3"):
        fusion("pairwise")(x, y, [(4, 4), (3, 3)])
    with pytest.raises(
        BackboneError, match="without a class token has nothing to fuse: build it with class_token=True"
    ):
        FusedPair(a, vit(8, 24, 2, class_token=False, global_pool="avg"))
    with pytest.raises(BackboneError, match="every=2 on 2 and 4 blocks: expected numbers that divide both"):
        FusedPair(a, vit(8, 24, 4), every=2)
    with pytest.raises(BackboneError, match="every=0 on 2 and 2 blocks"):
        timm.create_model(TINY[0], **{**TINY[1], "depth": (2, 2), "every": 0})
    with pytest.raises(BackboneError, match=r"\(1, 2, 3\) has 3 values: expected one, or one for each"):
        FusedPair(a, b, every=(1, 2, 3))
    with pytest.raises(BackboneError, match="36x36 pixels are no whole number of patches of 8x8"):
        FusedPair(vit(4, 16, 2, 36), vit(8, 24, 2, 36))
    with pytest.raises(BackboneError, match="num_classes are 5 and 7"):
        FusedPair(a, vit(8, 24, 2, num_classes=7))
    with pytest.raises(BackboneError, match="in_chans are 3 and 1"):
        FusedPair(a, vit(8, 24, 2, in_chans=1))
    with pytest.raises(BackboneError, match="CrossVit is not a plain ViT"):
        FusedPair(a, crossvit())
    with pytest.raises(BackboneError, match="VisionTransformerDistilled is not a plain ViT"):
        FusedPair(a, VisionTransformerDistilled(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2))
    with pytest.raises(BackboneError, match=r"normalised by mean and std .*0.5.* and .*0.485"):
        FusedPair(*(timm.create_model(name, depth=2) for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")))
    with pytest.raises(BackboneError, match="global_pool='' gives no vector"):
        FusedPair(a, vit(8, 24, 2, global_pool=""))
    pair = FusedPair(a, b, every=1, scheme="all")
    with pytest.raises(BackboneError, match="FusedPair has no cross-attention to show"):
        branch_attention(pair, images())
    with pytest.raises(BackboneError, match="VisionTransformer has no cross-attention to show"):
        branch_attention(a, images())  # pyright: ignore[reportArgumentType]
    with pytest.raises(BackboneError, match="two sequences make no vector without pooling"):
        pair.reset_classifier(3, "")
    with pytest.raises(BackboneError, match="output_fmt 'NHWC': expected NCHW or NLC"):
        pair.forward_intermediates(images(), output_fmt="NHWC")
