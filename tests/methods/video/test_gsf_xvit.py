import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.backbones.adapter import load_backbone
from foveal.core.errors import BackboneError, UsageError
from foveal.data.clips import fold, unfold
from foveal.methods.video.gsf_xvit import (
    GateShiftFuse,
    GsfXvit,
    Options,
    ProductHead,
    SpaceTimeMixing,
    part_losses,
    parts_of,
    shift,
    shuffle,
    waves,
)
from foveal.train.small import small_net, small_vit

T = 4
CLASSES = ("open+cup", "open+door", "shut+door")


def clips(count: int = 2, frames: int = T, size: int = 32) -> torch.Tensor:
    return torch.randn(count, frames, 3, size, size, generator=torch.Generator().manual_seed(3))


def cnn():
    return small_net("resnet18", 0, size=32, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), zero_init_last=False)


def vit():
    return small_vit(0, patch=8, width=64, depth=2)


def gsf(frames: int = T, moving: int = 8) -> GateShiftFuse:
    torch.manual_seed(1)
    return GateShiftFuse(frames, moving).eval()


def naive_gsf(module: GateShiftFuse, images: torch.Tensor) -> torch.Tensor:
    """One clip, one channel and one frame after the other."""
    F_, frames = module.moving, module.frames
    out = images.clone()
    for first in range(0, len(images), frames):
        x = images[first : first + frames, :F_]
        normed = F.batch_norm(
            x, module.norm.running_mean, module.norm.running_var, module.norm.weight, module.norm.bias
        ).relu()
        weight, bias = module.gate.weight.unflatten(0, (2, 3)).transpose(1, 2), module.gate_bias.flatten()
        g = torch.tanh(F.conv3d(normed.transpose(0, 1)[None], weight, bias, 1, 1, 1, 2))[0]
        for half in range(2):
            rows = range(half * F_ // 2, (half + 1) * F_ // 2)
            y, r = torch.zeros(frames, len(rows), *x.shape[2:]), torch.zeros(frames, len(rows), *x.shape[2:])
            for t in range(frames):
                source = t + 1 if half == 0 else t - 1
                for place, channel in enumerate(rows):
                    if 0 <= source < frames:
                        y[t, place] = g[half, source] * x[source, channel]
                    r[t, place] = x[t, channel] - g[half, t] * x[t, channel]
            pooled = torch.stack([y.mean((2, 3)).T, r.mean((2, 3)).T])[None]
            w = module.fuse[half](pooled).sigmoid()[0, 0]
            quarter = F_ // 4
            for t in range(frames):
                for place in range(len(rows)):
                    to = 2 * place if place < quarter else 2 * (place - quarter) + 1
                    kept = w[place, t] * y[t, place] + (1 - w[place, t]) * r[t, place]
                    out[first + t, half * F_ // 2 + to] = kept
    return out


def test_gsf_agrees_with_a_naive_loop_in_values_and_gradients():
    module = gsf()
    module.norm.running_mean.normal_()
    x = torch.randn(2 * T, 10, 5, 5, requires_grad=True)
    ours, theirs = module(x), naive_gsf(module, x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    wanted = [x, *module.parameters()]
    mine = torch.autograd.grad(ours.square().sum(), wanted)
    other = torch.autograd.grad(theirs.square().sum(), wanted)
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_closed_gate_is_no_identity():
    module = gsf()
    x = torch.randn(T, 8, 3, 3)
    for parameter in [*module.gate.parameters(), module.gate_bias, *module.fuse.parameters()]:
        nn.init.zeros_(parameter)
    halves = torch.cat([shuffle(half[None])[0] for half in (0.5 * x).split(4, 1)], 1)
    torch.testing.assert_close(module(x), halves)
    assert not torch.allclose(module(x), x)


def test_an_open_gate_is_a_pure_shift_and_a_shuffle():
    module = gsf()
    x = torch.randn(T, 8, 3, 3)
    nn.init.zeros_(module.gate.weight)
    nn.init.constant_(module.gate_bias, 30.0)
    for fuse in module.fuse:
        nn.init.zeros_(fuse.weight)
        nn.init.constant_(fuse.bias, 30.0)
    found = module(x)
    none = torch.zeros_like(x[:1])
    later, earlier = torch.cat([x[1:], none])[:, :4], torch.cat([none, x[:-1]])[:, 4:]
    order = [0, 2, 1, 3]
    torch.testing.assert_close(found, torch.cat([later[:, order], earlier[:, order]], 1))


@pytest.mark.parametrize(("share", "count"), [(0.25, 110_144), (1.0, 438_656)])
def test_parameters_of_gsf_on_resnet_50(share: float, count: int):
    with torch.device("meta"):
        backbone = load_backbone("resnet50", pretrained=False)
        before = sum(p.numel() for p in backbone.parameters())
        GsfXvit(Options(share=share)).attach(backbone, CLASSES)
    assert sum(p.numel() for p in backbone.parameters()) - before == count
    assert sum(p.numel() for p in gsf(moving=12).parameters()) == 29 * 12 + 40


def test_shift_pads_with_zeros_and_undoes_itself_inside():
    x = torch.randn(2, T, 3)
    later = shift(x, later=True)
    assert torch.equal(later[:, :-1], x[:, 1:])
    assert not later[:, -1].any()
    assert torch.equal(shift(later, later=False)[:, 1:], x[:, 1:])
    assert not shift(x, later=False)[:, 0].any()
    assert not shift(x[:, :1], later=True).any()


def test_mixing_agrees_with_a_naive_loop():
    C, d = 8, 4
    qkv = torch.randn(2 * T, 5, 3 * C)
    found = SpaceTimeMixing(T, C, d)(qkv)
    expected = qkv.clone()
    for frame in range(2 * T):
        t = frame % T
        for part in (1, 2):
            for channel in range(C):
                source = {0: t + 1, 1: t - 1}.get(channel // (C // d), t)
                inside = 0 <= source < T
                value = qkv[frame - t + source, :, part * C + channel] if inside else torch.zeros(5)
                expected[frame, :, part * C + channel] = value
    assert torch.equal(found, expected)


def test_xvit_adds_no_parameter_to_the_trunk_and_without_moving_channels_is_the_vit():
    plain = vit()
    before = sum(p.numel() for p in plain.parameters())
    x = clips()
    for share, same in ((0.0, True), (0.25, False)):
        backbone = copy.deepcopy(plain)
        model = GsfXvit(Options(mixer="xvit", frames=T, share=share)).attach(backbone, CLASSES).eval()
        assert sum(p.numel() for p in backbone.parameters()) == before
        with torch.no_grad():
            frames = model.backbone.finish_tokens(run(model, fold(x)))
            assert torch.allclose(frames, plain.eval()(fold(x)), atol=1e-5) == same


def test_neighbours_in_time_start_out_alike():
    places = waves(9, 16)
    for time in range(9):
        for channel in range(16):
            turns, cosine = channel % 4 + 1, channel % 8 >= 4
            angle = math.pi * turns * time / 8
            assert abs(places[time, channel]) == pytest.approx(abs((math.cos if cosine else math.sin)(angle)), abs=1e-5)
    apart = torch.cdist(places, places) + 100 * torch.eye(9)
    assert [abs(int(near) - place) for place, near in enumerate(apart.argmin(1))] == [1] * 9


def run(model, images):
    tokens = model.backbone.embed(images)
    for block in model.backbone.blocks:
        tokens = block(tokens)
    return tokens


@pytest.mark.parametrize("make", [cnn, vit])
def test_clips_never_see_each_other_and_one_frame_is_enough(make):
    model = GsfXvit(Options(frames=T, share=0.5)).attach(make(), CLASSES).eval()
    for layer in model.head.layers:
        nn.init.normal_(layer.weight)
    x = clips(3)
    with torch.no_grad():
        together = model(x)
        for row in range(3):
            torch.testing.assert_close(model(x[row : row + 1])[0], together[row], atol=1e-4, rtol=1e-4)
        backwards = model(x.flip(1))
        assert not torch.allclose(backwards, together, atol=1e-4), "blind to the order of frames"
    one = GsfXvit(Options(frames=1, share=0.5)).attach(make(), CLASSES).eval()
    with torch.no_grad():
        assert torch.isfinite(one(clips(2, 1))).all()


def test_averaging_frames_is_blind_to_their_order():
    model = GsfXvit(Options(mixer="none", frames=T)).attach(cnn(), CLASSES).eval()
    nn.init.normal_(model.head.layers[0].weight)
    x = clips()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x.flip(1)), atol=1e-5, rtol=1e-5)


def test_labels_of_parts():
    names, index = parts_of(CLASSES, "+")
    assert names == [["open", "shut"], ["cup", "door"]]
    head = ProductHead(6, names, index)
    for layer in head.layers:
        nn.init.normal_(layer.weight)
    x, labels, weights = torch.randn(5, 6), torch.tensor([0, 1, 2, 2, 0]), torch.tensor([1.0, 2.0, 0.5])
    verb, noun = (layer(x).softmax(1) for layer in head.layers)
    product = torch.stack([verb[:, v] * noun[:, n] for v, n in index.tolist()], 1)
    product = product / product.sum(1, keepdim=True)
    torch.testing.assert_close(head(x).softmax(1), product)
    by_hand = []
    for part in range(2):
        total = 0.0
        for row, label in enumerate(labels.tolist()):
            shared = [k for k in range(3) if index[k, part] == index[label, part]]
            total -= weights[label] * product[row, shared].sum().log()
        by_hand.append(total / 5)
    torch.testing.assert_close(part_losses(head(x), labels, weights, index), torch.stack(by_hand))
    one, _ = parts_of(CLASSES, "")
    assert one == [sorted(CLASSES)]


def test_bad_input_is_refused_in_words():
    with pytest.raises(UsageError, match="6 moving channels: GSF shuffles in quarters, expected a multiple of 4"):
        GateShiftFuse(T, 6)
    with pytest.raises(UsageError, match="batch of 7 frames is no whole number of clips of 4"):
        gsf()(torch.randn(7, 8, 3, 3))
    model = GsfXvit(Options(frames=T)).attach(vit(), CLASSES)
    with pytest.raises(UsageError, match=r"expected \[B, 4, 3, H, W\]"):
        model(clips(frames=2 * T))  # 16 frames given to 8 segments are not cut into two clips
    with pytest.raises(UsageError, match=r"class 'door' has 1 parts by separator=\+, 'open\+cup' has 2"):
        parts_of(("open+cup", "door"), "+")
    with pytest.raises(BackboneError, match="no token sequence"):
        GsfXvit(Options(mixer="xvit")).attach(cnn(), CLASSES)
    with pytest.raises(BackboneError, match="no residual blocks of convolutions"):
        GsfXvit(Options(mixer="gsf")).attach(vit(), CLASSES)
    with pytest.raises(BackboneError, match="raise share"):
        GsfXvit(Options(mixer="gsf", share=0.01)).attach(cnn(), CLASSES)
    assert torch.equal(unfold(fold(clips()), T), clips())


def test_what_is_new_learns_faster():
    method = GsfXvit(Options(frames=T, share=0.5))
    model = method.attach(cnn(), CLASSES)
    groups = method.parameter_groups(model, method.recipe())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.head.layers[0].weight)] == pytest.approx(2 * method.recipe().lr)
    assert rate[id(next(m for m in model.modules() if isinstance(m, GateShiftFuse)).gate.weight)] == pytest.approx(1e-3)
    assert rate[id(model.backbone.model.conv1.weight)] == pytest.approx(5e-4)
