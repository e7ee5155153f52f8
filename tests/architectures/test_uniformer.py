import itertools

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import foveal.architectures  # noqa: F401
from foveal.architectures.uniformer import VIDEO, GlobalBlock, LocalBlock, create_video_model, inflate
from foveal.core import cards
from foveal.core.errors import BackboneError

TINY = ("uniformer_small", {"dims": (8, 16, 16, 32), "head_dim": 8, "depths": (1, 1, 1, 1)})


def tiny(**more):
    return timm.create_model(TINY[0], **{**TINY[1], "num_classes": 5, **more})


def loud(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.05, 0.25)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def naive_local(block: LocalBlock, x: Tensor) -> Tensor:
    """The three residual steps, one place at a time."""

    def depthwise(conv: nn.Conv2d, maps: Tensor) -> Tensor:
        out = torch.zeros_like(maps)
        reach = conv.kernel_size[0] // 2
        height, width = maps.shape[2:]
        for i, j in itertools.product(range(height), range(width)):
            total = conv.bias[None].expand(len(maps), -1)
            for u, v in itertools.product(range(-reach, reach + 1), repeat=2):
                if 0 <= i + u < height and 0 <= j + v < width:
                    total = total + maps[:, :, i + u, j + v] * conv.weight[:, 0, u + reach, v + reach]
            out[:, :, i, j] = total
        return out

    def pointwise(conv: nn.Conv2d, maps: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], maps) + conv.bias[:, None, None]

    def norm(layer: nn.BatchNorm2d, maps: Tensor) -> Tensor:
        centred = (maps - layer.running_mean[:, None, None]) / (layer.running_var + layer.eps).sqrt()[:, None, None]
        return centred * layer.weight[:, None, None] + layer.bias[:, None, None]

    x = x + depthwise(block.pos_embed, x)
    x = x + pointwise(block.conv2, depthwise(block.attn, pointwise(block.conv1, norm(block.norm1, x))))
    hidden = pointwise(block.fc1, norm(block.norm2, x))
    return x + pointwise(block.fc2, hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def test_the_local_block_is_the_naive_one_gradients_too():
    block = loud(LocalBlock(3)).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(block(x), naive_local(block, x))
    variables = [x, *block.parameters()]
    ours = torch.autograd.grad(block(x).sin().sum(), variables)
    theirs = torch.autograd.grad(naive_local(block, x).sin().sum(), variables)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rank", [2, 3])
def test_batch_norms_fold_into_the_convolutions_after_them(rank: int):
    block = loud(LocalBlock(4, rank=rank))
    x = torch.randn(2, 4, *[6] * rank)
    before = block(x)
    for _ in range(2):
        block.reparameterize()
        torch.testing.assert_close(block(x), before, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in block.modules())


@pytest.mark.parametrize("layer_scale", [False, True])
def test_the_global_block_is_attention_of_all_places(layer_scale: bool):
    block = loud(GlobalBlock(8, 2, layer_scale=layer_scale)).double()
    x = torch.randn(1, 8, 3, 4, dtype=torch.double)
    after = x + block.pos_embed(x)
    tokens = after.flatten(2)[0].T
    q, k, v = block.attn.qkv(block.norm1(tokens)).chunk(3, -1)
    heads = [((q[:, own] @ k[:, own].T) * 4**-0.5).softmax(-1) @ v[:, own] for own in (slice(0, 4), slice(4, 8))]
    one = torch.ones(8, dtype=torch.double)
    tokens = tokens + (block.gamma_1 if layer_scale else one) * block.attn.proj(torch.cat(heads, -1))
    tokens = tokens + (block.gamma_2 if layer_scale else one) * block.mlp(block.norm2(tokens))
    torch.testing.assert_close(block(x), tokens.T.reshape(1, 8, 3, 4))


def test_early_stages_are_local_and_late_ones_are_not():
    model = loud(tiny())
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    maps = model.forward_intermediates(x, intermediates_only=True)
    (near,) = torch.autograd.grad(maps[0][0, :, 8, 8].sum(), x, retain_graph=True)
    seen = near[0].abs().sum(0) > 0
    reach = 3  # positions of 4 pixels: 1 by the position's convolution, 2 by the mixer's
    assert seen[4 * (8 - reach) : 4 * (8 + reach + 1), 4 * (8 - reach) : 4 * (8 + reach + 1)].any()
    seen[4 * (8 - reach) : 4 * (8 + reach + 1), 4 * (8 - reach) : 4 * (8 + reach + 1)] = False
    assert not seen.any()
    (far,) = torch.autograd.grad(maps[2][0, :, 0, 0].sum(), x)
    assert (far[0, :, -4:, -4:] != 0).any()


def test_one_set_of_weights_serves_any_size():
    model = loud(tiny())
    for height, width in ((64, 64), (96, 128)):
        maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
        assert [tuple(each.shape[2:]) for each in maps] == [(height // s, width // s) for s in (4, 8, 16, 32)]


def test_positions_move_with_the_image_in_the_interior():
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    layer.load_state_dict(loud(LocalBlock(4)).pos_embed.state_dict())
    x = torch.randn(1, 4, 12, 12)
    moved = layer(x.roll((2, 3), (2, 3)))
    torch.testing.assert_close(moved[:, :, 4:-2, 5:-2], layer(x).roll((2, 3), (2, 3))[:, :, 4:-2, 5:-2])


def test_a_scaled_model_leaves_later_ones_alone():
    with torch.device("meta"):
        before = timm.create_model("uniformer_base").state_dict().keys()
        scaled = timm.create_model("uniformer_base_ls").state_dict().keys()
        assert timm.create_model("uniformer_base").state_dict().keys() == before
    gammas = {name for name in scaled if "gamma" in name}
    assert len(gammas) == 2 * (20 + 7)
    assert scaled - gammas == before


def macs(**more) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        tiny(num_classes=1000, **more)(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def test_attention_everywhere_costs_most_and_nowhere_least():
    mixed, local, everywhere = macs(), macs(mixers=("local",) * 4), macs(mixers=("global",) * 4)
    assert local < mixed < everywhere


@pytest.mark.parametrize("name", VIDEO)
def test_video_parameters_are_those_of_the_card(name: str):
    with torch.device("meta"):
        model = create_video_model(name)
    expected = cards.read_card("uniformer")["video_variants"][name]["parameters"]
    assert sum(p.numel() for p in model.parameters()) == expected


def video(**more):
    return create_video_model("uniformer_video_small", **{**TINY[1], "num_classes": 5, **more}).eval()


def test_identical_frames_through_an_inflated_net_are_the_image():
    image, clip = loud(tiny()), video()
    inflate(image.state_dict(), clip)
    clip.head.load_state_dict(image.head.state_dict())
    x = torch.randn(1, 3, 64, 64)
    frames = x[:, :, None].expand(-1, -1, 6, -1, -1)
    with torch.no_grad():
        maps = clip.forward_intermediates(frames, intermediates_only=True)
        for ours, theirs in zip(maps, image.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(ours, theirs[:, :, None].expand_as(ours), atol=1e-3, rtol=1e-3)
        assert maps[0].shape[2] == 3
        torch.testing.assert_close(clip(frames), image(x), atol=1e-3, rtol=1e-3)

        inflate(image.state_dict(), clip, "repeat")  # equal where no kernel reaches past the first or last frame
        first = clip.stages[0].downsample(frames)[:, :, 1]
        torch.testing.assert_close(first, image.stages[0].downsample(x), atol=1e-4, rtol=1e-4)


def test_symmetric_kernels_see_a_clip_forwards_as_backwards():
    block = loud(LocalBlock(4, rank=3))
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.copy_((module.weight + module.weight.flip(2)) / 2)
    x = torch.randn(1, 4, 5, 6, 6)
    torch.testing.assert_close(block(x.flip(2)), block(x).flip(2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny()(torch.zeros(1, 3, 80, 100)), r"80x100.*multiples of 32, such as 64x96"),
        (lambda: timm.create_model("uniformer_small", dims=(64, 128, 300, 512)), r"width 300 of stage 3.*head_dim 64"),
        (lambda: video()(torch.zeros(1, 3, 5, 32, 32)), "clips of 5 frames"),
        (lambda: video()(torch.zeros(1, 3, 0, 32, 32)), "clips of 0 frames"),
        (lambda: video()(torch.zeros(1, 3, 32, 32)), r"shape \(1, 3, 32, 32\).*\[B, C, T, H, W\]"),
        (lambda: tiny()(torch.zeros(1, 3, 4, 32, 32)), r"expected images \[B, C, H, W\]"),
        (lambda: create_video_model("uniformer_video_huge"), "uniformer_video_huge"),
        (lambda: inflate(tiny(layer_scale=True).state_dict(), video()), r"4 tensors such as .*gamma"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message):
        build()
