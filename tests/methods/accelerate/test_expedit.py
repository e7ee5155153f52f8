"""Expedit against a triple loop, and what must hold of clusters and of the tokens rebuilt from them."""

import copy
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, Plan, build, load_backbone
from foveal.backbones.tokens import Marked
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Target
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.evaluate.beside import share_of
from foveal.features.graph import to_onnx
from foveal.methods.accelerate.expedit import (
    Clusters,
    Expedit,
    Options,
    allowed,
    cluster,
    distances,
    pooling,
    reconstruct,
)

SIZE = 48


def vit(arch: str = "vit_tiny_patch16_224", **args: object) -> Classifier:
    """A ViT with 6 x 6 patch tokens and six blocks; by default a plain one that reads its class token."""
    given = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2, **args}
    plan = Plan("vit", arch, given, Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3), 24, "random")
    torch.manual_seed(0)
    backbone = Backbone(plan, build(plan))
    return Classifier(backbone, nn.Linear(24, 3)).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def tokens(full: tuple[int, int], width: int = 5, batch: int = 2) -> Tensor:
    return 3 * torch.randn(batch, math.prod(full), width, generator=torch.Generator().manual_seed(2))


def barrier(full: tuple[int, int], small: tuple[int, int], window: int) -> Tensor:
    return torch.zeros(math.prod(full), math.prod(small)).masked_fill(~allowed(full, small, window), -torch.inf)


def naive_cluster(
    z: Tensor, full: tuple[int, int], small: tuple[int, int], window: int, rounds: int, tau: float
) -> Tensor:
    """One image's tokens [N, C] -> clusters [M, C], token by token and cluster by cluster."""
    (H, W), (h, w), r = full, small, (window - 1) // 2
    s = F.adaptive_avg_pool2d(z.T.reshape(1, -1, H, W), small)[0].flatten(1).T.clone()
    cells = torch.arange(h * w, dtype=torch.float32).reshape(1, 1, h, w)
    own = F.interpolate(cells, full, mode="nearest").flatten().long().tolist()
    for _ in range(rounds):
        total, weight = torch.zeros_like(s), torch.zeros(h * w)
        for p in range(H * W):
            y, x = divmod(own[p], w)
            near = [i for i in range(h * w) if abs(i // w - y) <= r and abs(i % w - x) <= r]
            shares = torch.softmax(torch.stack([-tau * sum((z[p] - s[i]) ** 2) for i in near]), 0)
            for i, share in zip(near, shares, strict=True):
                total[i] += share * z[p]
                weight[i] += share
        s = total / weight.clamp_min(1e-16)[:, None]
    return s


def naive_reconstruct(z: Tensor, s: Tensor, refined: Tensor, k: int, tau: float, norm: str) -> Tensor:
    rows = []
    for p in range(len(z)):
        w = [math.exp(-tau * float(((z[p] - s[i]) ** 2).sum())) for i in range(len(s))]
        kept = sorted(range(len(s)), key=lambda i: -w[i])[:k]
        length = sum(w[i] for i in kept) if norm == "sum" else math.sqrt(sum(w[i] ** 2 for i in kept))
        rows.append(sum(w[i] / length * refined[i] for i in kept))
    return torch.stack(rows)


@pytest.mark.parametrize(("full", "small"), [((6, 6), (3, 3)), ((4, 6), (3, 4)), ((7, 5), (2, 3))])
@pytest.mark.parametrize("window", [1, 3])
def test_it_agrees_with_a_triple_loop(full: tuple[int, int], small: tuple[int, int], window: int):
    z = tokens(full)
    pool, walls = pooling(full, small), barrier(full, small, window)
    for rounds in (0, 1, 3):
        s = cluster(z, pool, walls, rounds, 0.1)
        for image in range(len(z)):
            expected = naive_cluster(z[image], full, small, window, rounds, 0.1)
            assert torch.allclose(s[image], expected, atol=1e-4)
    refined = torch.randn_like(s)
    for k in (1, 3, len(refined[0])):
        for norm in ("sum", "l2"):
            rebuilt = reconstruct(z, s, refined, k, 0.1, norm)
            for image in range(len(z)):
                expected = naive_reconstruct(z[image], s[image], refined[image], k, 0.1, norm)
                assert torch.allclose(rebuilt[image], expected, atol=1e-4)


def test_as_many_clusters_as_tokens_change_nothing():
    full = (4, 4)
    z = tokens(full)
    s = cluster(z, pooling(full, full), barrier(full, full, 1), 3, 0.02)
    assert torch.allclose(s, z, atol=1e-5)
    assert torch.allclose(reconstruct(z, s, s, 1, 1e3), z, atol=1e-5)
    model = vit()
    x = images()
    with torch.inference_mode():
        dense = model(x)
        chosen = Options(window=1, nearest=1, tau=1e3, dense=True)
        model.backbone.token_hook = Clusters(1, (6, 6), (6, 6), 2, 4, True, chosen)
        assert torch.allclose(model(x), dense, atol=1e-5)


def test_clusters_are_convex_and_keep_to_their_window():
    full, small = (6, 6), (3, 3)
    z, walls = tokens(full), barrier(full, small, 3)
    s = cluster(z, pooling(full, small), walls, 5, 0.02)
    assert (s >= z.amin(1, keepdim=True) - 1e-5).all()
    assert (s <= z.amax(1, keepdim=True) + 1e-5).all()
    a = torch.softmax(walls - 0.02 * distances(z, s), 2)
    assert torch.allclose(a.sum(2), torch.ones(2, 36), atol=1e-6)
    assert (a[:, ~allowed(full, small, 3)] == 0).all()
    assert not allowed(full, small, 3)[0].reshape(3, 3)[2].any(), "the first token may join the last row"
    assert torch.equal(cluster(z.flip(0), pooling(full, small), walls, 5, 0.02), s.flip(0))


def test_equal_tokens_tell_the_norms_apart():
    z = torch.full((1, 9, 4), 2.0)
    s = torch.full((1, 4, 4), 2.0)
    assert torch.allclose(reconstruct(z, s, s, 4, 0.02, "sum"), z, atol=1e-6)
    assert torch.allclose(reconstruct(z, s, s, 4, 0.02, "l2"), 2 * z, atol=1e-5)
    far = 1e4 * torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(reconstruct(far, s, s, 4, 10.0)).all(), "far clusters underflow"


@pytest.mark.parametrize("args", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_on_a_vit(args: dict[str, object], tmp_path: Path):
    """The weights stay, the prefix is set aside, the output grid is the input's, and ONNX agrees."""
    model = vit(**args)
    before, x = copy.deepcopy(model.state_dict()), images()
    made = Expedit(Options(after=2, dense=True, tau=0.1, nearest=4)).shrink(model, None, None)
    assert model.backbone.token_hook is None, "the argument was changed"
    after = made.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert made.plan == {"tokens": [6, 6], "clusters": [4, 4], "start": 2, "stop": 6}
    counts: list[int] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: counts.append(out.shape[1])) for block in blocks(made.module)
    ]
    with torch.inference_mode():
        full = made.module.backbone.tokens(x)
        logits = made.module(x)
    for hook in hooks:
        hook.remove()
    prefix = model.backbone.prefix
    assert counts[:6] == [36 + prefix] * 2 + [16 + prefix] * 4
    assert full.shape == (2, 36 + prefix, 24)
    rebuilt = Expedit(Options(after=2, dense=True, tau=0.1, nearest=4)).rebuild(vit(**args), made.plan)
    with torch.inference_mode():
        assert torch.equal(rebuilt(x), logits)
        assert not torch.allclose(model(x), logits, atol=1e-6), "nothing was done"
    to_onnx(made.module, (x,), tmp_path / "m.onnx", ["x"], ["y"], {"x": {0: "n"}, "y": {0: "n"}})
    more = images(5)
    (answered,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": more.numpy()})
    with torch.inference_mode():
        assert np.abs(answered - made.module(more).numpy()).max() < 1e-4


def blocks(model: Classifier) -> nn.ModuleList:
    return model.backbone.model.blocks


def test_where_the_class_token_is_read_rebuilding_changes_nothing():
    model, x = vit(), images()
    short = Expedit(Options(after=3)).shrink(model, None, None).module
    dense = Expedit(Options(after=3, nearest=9, dense=True)).shrink(model, None, None).module
    with torch.inference_mode():
        assert torch.allclose(short(x), dense(x), atol=1e-6)
        assert short.backbone.tokens(x).shape[1] == 17
        assert dense.backbone.tokens(x).shape[1] == 37
    mean = Expedit(Options(after=3, nearest=9)).shrink(vit(class_token=False, global_pool="avg"), None, None).module
    with torch.inference_mode():
        assert mean.backbone.tokens(x).shape[1] == 36, "what is averaged are all tokens"


def test_gathered_equals_masked():
    """Clusters alone, and clusters in a sequence of the old length whose rest nobody attends to."""
    for options in (Options(after=2), Options(after=2, blocks=2, nearest=9)):
        made = Expedit(options).shrink(vit(reg_tokens=2), None, None).module
        x = images()
        with torch.inference_mode():
            gathered = made.backbone.tokens(x)
            made.backbone.token_hook = Marked(made.backbone.token_hook)
            masked = made.backbone.tokens(x)
        assert masked.shape[1] == 39
        assert torch.allclose(masked[:, : gathered.shape[1]], gathered, atol=1e-5)


def test_a_target_is_met_by_the_largest_grid_that_does():
    model = vit()

    def measure(candidate: Classifier) -> float:
        return share_of("macs", candidate, model, SIZE)

    made = Expedit(Options(after=1)).shrink(model, None, Target("macs", 0.7, measure))
    assert measure(made.module) <= 0.7
    larger = [side + 1 for side in made.plan["clusters"]]
    assert measure(Expedit(Options(after=1)).rebuild(vit(), {**made.plan, "clusters": larger})) > 0.7
    with pytest.raises(
        UsageError, match=r"macs=0.2 is out of reach: 1 x 1 clusters after 3 of the blocks leave 0\.\d+"
    ):
        Expedit(Options(after=3)).shrink(model, None, Target("macs", 0.2, measure))
    with pytest.raises(UsageError, match="a target of macs chooses the clusters"):
        Expedit(Options(height=2)).shrink(model, None, Target("macs", 0.7, measure))


def test_the_frontier_falls():
    model = vit()
    costs = [share_of("macs", each, model, SIZE) for each in Expedit(Options(after=1)).frontier(model).values()]
    assert len(costs) == 4
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_bad_input():
    model = vit()
    for options, message in (
        (Options(height=6, width=6), "6 x 6 clusters for 6 x 6 tokens: expected fewer"),
        (Options(height=2, width=7), "2 x 7 clusters for 6 x 6 tokens: expected fewer, and no more rows or columns"),
        (Options(window=4), "window=4: expected an odd number, such as 5"),
        (Options(after=6), "after=6: the model has 6 blocks, expected 0 to 5"),
        (Options(after=4, blocks=3), "blocks=3: 2 blocks are left after 4"),
    ):
        with pytest.raises(UsageError, match=message):
            Expedit(options).shrink(model, None, None)
    with pytest.warns(UserWarning, match="nearest=20: there are 9 clusters, all serve"):
        Expedit(Options(height=3, width=3, dense=True)).shrink(model, None, None)
    with pytest.raises(ValueError, match="tau"):
        Options(tau=0)
    convolutional = load_backbone("test_efficientnet", pretrained=False, size=SIZE)
    with pytest.raises(
        BackboneError, match=r"test_efficientnet \(cnn\) has windows, positions fixed inside attention, or none"
    ):
        Expedit().shrink(Classifier(convolutional, nn.Linear(256, 3)).eval(), None, None)
    biased = vit("vit_relpos_small_patch16_224", class_token=False)
    with pytest.raises(
        BackboneError, match=r"vit_relpos_small_patch16_224 \(vit\) has windows, positions fixed inside"
    ):
        Expedit().shrink(biased, None, None)
    made = Expedit().shrink(model, None, None)
    with pytest.raises(BackboneError, match="already changed on their way: expedit comes first"):
        Expedit().shrink(made.module, None, None)
    for wrong in ({"clusters": [6, 7]}, {"clusters": [0, 3]}, {"tokens": [9, 9]}, {"stop": 7}, {"start": 6}):
        with pytest.raises(UsageError, match="the plan of expedit is for other tokens or blocks"):
            Expedit().rebuild(vit(), {**made.plan, **wrong})
