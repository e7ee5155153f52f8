import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures.transnext import AggregatedAttention, ConvGLU, CosineAttention, OffsetBias
from foveal.core.errors import BackboneError

TINY = (
    "transnext_micro",
    {"img_size": 64, "dims": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)},
)


def loud(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return module


def log_offset(offset: float, positions: int) -> float:
    scaled = 8 * offset / (positions - 1)
    return math.copysign(math.log2(abs(scaled) + 1) / math.log2(8), scaled)


def naive_bias(cpb: OffsetBias, size: tuple[int, int], r: int) -> Tensor:
    """[heads, N, P], one pair of query and key at a time; key positions are averages of what was pooled."""
    height, width = size
    keys = [
        (sum(range(r * a, r * a + r)) / r, sum(range(r * b, r * b + r)) / r)
        for a in range(height // r)
        for b in range(width // r)
    ]
    rows = []
    for i in range(height):
        for j in range(width):
            pairs = torch.tensor(
                [[log_offset(i - y, cpb.pretrain[0]), log_offset(j - x, cpb.pretrain[1])] for y, x in keys],
                dtype=cpb.fc1.weight.dtype,
            )
            rows.append(cpb.fc2(torch.relu(cpb.fc1(pairs))))
    return torch.stack(rows).permute(2, 0, 1)


def naive(attention: AggregatedAttention, x: Tensor) -> Tensor:
    """Aggregated attention of one image [C, H, W], every head and place by itself."""
    channels, height, width = x.shape
    heads, r, d = attention.heads, attention.reduction, channels // attention.heads
    tokens = x.permute(1, 2, 0)
    q, kv = attention.q(tokens), attention.kv(tokens)
    pooled = F.adaptive_avg_pool2d(F.gelu(attention.sr(x[None])), (height // r, width // r))[0]
    kv_pool = attention.kv(attention.norm(pooled.flatten(1).T))
    bias = naive_bias(attention.cpb, (height, width), r)
    out = torch.zeros(height, width, channels, dtype=x.dtype)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        value = slice(channels + h * d, channels + (h + 1) * d)
        for i in range(height):
            for j in range(width):
                unit = q[i, j, own] / q[i, j, own].norm()
                places = [(i + u, j + v) for u in (-1, 0, 1) for v in (-1, 0, 1)]
                valid = [n for n, (a, b) in enumerate(places) if 0 <= a < height and 0 <= b < width]
                count = len(valid) + len(kv_pool)
                temperature = math.log1p(attention.temperature[h, 0, 0].exp().item())
                query = (unit + attention.query_embedding[h, 0]) * temperature * math.log(count)
                logits, values = [], []
                for n in valid:
                    key = kv[(*places[n], own)]
                    logits.append(query @ key / key.norm() + attention.relative_pos_bias_local[h, n])
                    values.append(kv[(*places[n], value)])
                for n, each in enumerate(kv_pool):
                    logits.append(query @ each[own] / each[own].norm() + bias[h, i * width + j, n])
                    values.append(each[value])
                weights = torch.stack(logits).softmax(0)
                token = unit @ attention.learnable_tokens[h] + attention.learnable_bias[h, 0]
                extra = torch.stack([token[n] for n in valid])
                weights = torch.cat([weights[: len(valid)] + extra, weights[len(valid) :]])
                out[i, j, own] = weights @ torch.stack(values)
    return attention.proj(out).permute(2, 0, 1)


def test_aggregated_attention_is_the_naive_double_loop_gradients_too():
    torch.manual_seed(0)
    attention = loud(AggregatedAttention(8, 2, reduction=4, pretrain=(8, 8)).double())
    x = torch.randn(1, 8, 8, 8, dtype=torch.double, requires_grad=True)
    expected = naive(attention, x[0])[None]
    torch.testing.assert_close(attention(x), expected, atol=1e-8, rtol=1e-8)
    variables = [x, *attention.parameters()]
    ours = torch.autograd.grad(attention(x).sin().sum(), variables)
    theirs = torch.autograd.grad(expected.sin().sum(), variables, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:  # the temperature enters the naive form as a number
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("size", "r"), [((8, 8), 4), ((6, 10), 2), ((4, 4), 1), ((4, 6), 2)])
def test_the_table_of_offsets_is_every_pairs_own(size: tuple[int, int], r: int):
    cpb = loud(OffsetBias(3, r, pretrain=(7, 9)))
    torch.testing.assert_close(cpb(*size), naive_bias(cpb, size, r))


def rows_of(attention: AggregatedAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    size = tuple(x.shape[2:])
    tokens = torch.randn(1, attention.heads, size[0] * size[1], x.shape[1] // attention.heads)
    unit = F.normalize(tokens, dim=-1)
    pooled = unit[:, :, :4]
    return attention.weights(unit, unit, pooled, size)


def test_weights_sum_to_one_and_are_zero_outside_the_map():
    attention = loud(AggregatedAttention(8, 2, reduction=4, pretrain=(8, 8)))
    local, pooled = rows_of(attention, torch.zeros(1, 8, 8, 8))
    torch.testing.assert_close(local.sum(-1) + pooled.sum(-1), torch.ones(1, 2, 64))
    corner = local[0, :, 0]
    assert torch.equal(corner[:, [0, 1, 2, 3, 6]], torch.zeros(2, 5))
    assert (corner[:, [4, 5, 7, 8]] > 0).all()
    assert (local[0, :, 9] > 0).all()


def test_the_length_of_a_query_does_not_matter():
    attention = loud(AggregatedAttention(8, 2, reduction=2, pretrain=(4, 4)))
    x = torch.randn(1, 8, 4, 4)
    before = attention(x)
    with torch.no_grad():
        attention.q.weight.mul_(7)
        attention.q.bias.mul_(7)
    torch.testing.assert_close(attention(x), before, atol=1e-5, rtol=1e-5)


def test_the_last_stage_is_cosine_attention_of_all_to_all():
    torch.manual_seed(0)
    attention = loud(CosineAttention(8, 2, pretrain=(3, 4)))
    x = torch.randn(2, 8, 3, 4)
    q, k, v = attention.qkv(x.flatten(2).transpose(1, 2)).reshape(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
    unit, keys = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    query = (unit + attention.query_embedding) * attention.temperature.exp().log1p() * math.log(12)
    weights = (query @ keys.transpose(-2, -1) + naive_bias(attention.cpb, (3, 4), 1)).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2)).transpose(1, 2).reshape(2, 8, 3, 4)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_convglu_is_the_gate_times_the_value_and_has_the_published_widths():
    layer = ConvGLU(6, 4)
    x = torch.randn(2, 6, 5, 5)
    a, v = layer.fc1(x.permute(0, 2, 3, 1)).chunk(2, -1)
    gated = F.gelu(layer.dwconv(a.permute(0, 3, 1, 2))).permute(0, 2, 3, 1) * v
    torch.testing.assert_close(layer(x), layer.fc2(gated).permute(0, 3, 1, 2))
    with torch.device("meta"):
        model = timm.create_model("transnext_micro")
    assert [stage.blocks[0].mlp.dwconv.in_channels for stage in model.stages] == [256, 512, 512, 1024]
    attention = model.stages[0].blocks[0].attn
    assert attention.temperature.shape == (2, 1, 1)
    fresh = AggregatedAttention(48, 2, 8, (56, 56))
    torch.testing.assert_close(F.softplus(fresh.temperature), torch.full((2, 1, 1), 1 / 0.24))


def test_another_size_needs_another_build_with_the_same_parameters():
    name, args = TINY
    model = timm.create_model(name, **args).eval()
    with pytest.raises(BackboneError, match=r"built for 64x64 pixels and got 96x96.*img_size=96"):
        model(torch.zeros(1, 3, 96, 96))
    larger = timm.create_model(name, **{**args, "img_size": 96}, pretrain_size=64).eval()
    larger.load_state_dict(model.state_dict())
    loose = timm.create_model(name, **args, strict_img_size=False).eval()
    loose.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(larger(x), loose(x))
    assert loose(torch.randn(1, 3, 64, 128)).shape == (1, 1000)
    with pytest.raises(BackboneError, match=r"64x80.*multiples of 32"):
        loose(torch.zeros(1, 3, 64, 80))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("transnext_micro", img_size=240), r"240x240.*multiples of 32.*224"),
        (lambda: timm.create_model("transnext_micro_aaaa", img_size=224), r"224x224.*multiples of 64.*192"),
        (lambda: AggregatedAttention(8, 2, 4, (8, 8), window=4), "window of 4"),
        (lambda: AggregatedAttention(8, 3, 4, (8, 8)), "3 heads do not divide 8 channels"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message), torch.device("meta"):
        build()
