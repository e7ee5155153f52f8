"""CLIP's loss against two loops, the exact counts of the paper's models, and what padding may not change."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.backbones.causal_text import CausalText
from foveal.backbones.towers import Towers, gathered
from foveal.core import catalogue
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.methods.language.clip import Clip, Options, contrastive_loss, paper_model
from foveal.train.small import small_vit

COUNTS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336": 427_944_193,
}


def drawn(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """The loss by two loops over logits."""
    total = images.new_zeros(())
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(a)):
            logits = [scale * torch.dot(a[i] / a[i].norm(), b[j] / b[j].norm()) for j in range(len(b))]
            total = total - logits[i] + torch.logsumexp(torch.stack(logits), 0)
    return total / (2 * len(images))


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(0)
    return made()


def made() -> Towers:
    method = catalogue.create("clip:text=scratch,dim=16")
    assert isinstance(method, Clip)
    towers = method.attach(small_vit(0, patch=16, width=32, depth=1), CausalText(32, 2, context=20))
    assert isinstance(towers, Towers)
    return towers


def test_loss_and_gradients_agree_with_two_loops():
    images, texts = drawn(5, 7, 0).requires_grad_(), drawn(5, 7, 1).requires_grad_()
    ours, theirs = contrastive_loss(images, texts, 9.0), naive(images, texts, 9.0)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, [images, texts]), torch.autograd.grad(theirs, [images, texts]), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-9)


def test_loss_does_not_know_sides_order_or_length():
    images, texts = drawn(6, 8, 2), drawn(6, 8, 3)
    loss = contrastive_loss(images, texts, 20.0)
    order, lengths = torch.tensor([3, 0, 5, 1, 4, 2]), drawn(6, 1, 4).exp()
    assert torch.allclose(contrastive_loss(texts, images, 20.0), loss)
    assert torch.allclose(contrastive_loss(images[order], texts[order], 20.0), loss)
    assert torch.allclose(contrastive_loss(images * lengths, texts / lengths, 20.0), loss)
    assert not torch.allclose(contrastive_loss(images[order], texts, 20.0), loss)


def test_identical_pairs_cost_the_logarithm_of_their_number():
    same = drawn(1, 5, 0).expand(11, 5)
    assert float(contrastive_loss(same, same, 14.0)) == pytest.approx(math.log(11), abs=1e-12)


def test_one_pair_has_no_negatives():
    with pytest.raises(UsageError, match="no negatives: choose a batch_size of at least 2"):
        contrastive_loss(drawn(1, 4, 0), drawn(1, 4, 1), 1.0)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_papers_models(name: str):
    with torch.device("meta"):
        model = paper_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_a_model_that_the_paper_does_not_have():
    with pytest.raises(UsageError, match="no CLIP model 'ViT-S/8': expected one of RN50"):
        paper_model("ViT-S/8")


def test_scale_starts_at_the_papers_and_never_passes_100(towers: Towers):
    assert float(towers.scale.detach()) == pytest.approx(14.2857, abs=1e-3)
    other = made()
    with torch.no_grad():
        other.log_scale.fill_(9.0)
    Clip().after_step(other, 1)
    assert float(other.scale.detach()) == pytest.approx(100, rel=1e-6)


def test_what_comes_after_the_end_changes_nothing(towers: Towers):
    text = towers.text
    ids, mask = text.tokens(["a cat", "a longer text"])
    with torch.inference_mode():
        before = text(ids, mask)
        behind = ids.clone()
        behind[0, -3:] = 7  # padding of the shorter text
        assert torch.equal(text(behind, mask)[0], before[0])
        wider = F.pad(ids, (0, 2), value=3)
        assert torch.allclose(text(wider, F.pad(mask, (0, 2))), before, atol=1e-6)
        inside = ids.clone()
        inside[0, 1] = 9
        assert not torch.allclose(text(inside, mask)[0], before[0], atol=1e-3)
        assert torch.equal(text(*text.tokens(["A  CAT "])), text(*text.tokens(["a cat"])))


def test_a_text_that_does_not_fit_is_named(towers: Towers):
    with pytest.raises(DataError, match="'this text is longer than twenty bytes' has 39 tokens, at most 20 fit"):
        towers.text.tokens(["short", "this text is longer than twenty bytes"])
    ids, mask = towers.text.tokens(["this text is longer than twenty bytes"], truncate=True)
    assert ids.shape == (1, 20)
    assert int(ids[0, -1]) == 258
    assert bool(mask.all())
    with pytest.raises(DataError, match="a text is empty"):
        towers.text.tokens(["  "])


def test_wrong_widths_patches_and_pixels(towers: Towers):
    with pytest.raises(BackboneError, match="width 100 is not divisible by 3 heads"):
        CausalText(100, 1, heads=3)
    with pytest.raises(BackboneError, match="225 pixels are not divisible into patches of 16"):
        Towers(load_backbone("test_vit", pretrained=False, size=225), CausalText(32, 1), 8)
    with pytest.raises(DataError, match=r"images of type torch.uint8: expected float32"):
        towers.encode_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_what_is_pretrained_learns_more_slowly_or_not_at_all():
    method = catalogue.create("clip:text=scratch,dim=16,pretrained=0,learn_temperature=false")
    assert isinstance(method, Clip)
    image = small_vit(0, patch=16, width=32, depth=1)
    known = Backbone(image.plan.__class__(**{**vars(image.plan), "origin": "package"}), image.model)
    frozen = method.attach(known, CausalText(32, 1, context=20))
    assert isinstance(frozen, Towers)
    assert not any(p.requires_grad for p in frozen.image.parameters())
    assert not frozen.train().image.training
    assert frozen.text.training
    assert not frozen.log_scale.requires_grad
    slow = catalogue.create("clip:text=scratch,dim=16,pretrained=0.5")
    assert isinstance(slow, Clip)
    model = slow.attach(known, CausalText(32, 1, context=20))
    assert isinstance(model, Towers)
    groups = slow.parameter_groups(model, slow.recipe())
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(rates) == {id(p) for p in model.parameters()}
    assert rates[id(model.image_proj.weight)] == (5e-4, 0.2)
    assert rates[id(model.log_scale)] == (5e-4, 0.0)
    assert rates[id(next(p for p in model.image.parameters() if p.ndim > 1))] == (2.5e-4, 0.2)
    assert rates[id(next(p for p in model.image.parameters() if p.ndim == 1))] == (2.5e-4, 0.0)


def test_copies_of_a_prompt_are_one_prompt(towers: Towers):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one = towers.encode_texts(*towers.text.tokens(["a cat", "a dog"]))
        many = towers.encode_texts(*towers.text.tokens(["a cat"] * 4 + ["a dog"] * 4))
        ensemble = F.normalize(many.unflatten(0, (2, 4)).mean(1))
        logits = towers.classifier(one)(pixels)
        assert torch.allclose(towers.classifier(ensemble)(pixels), logits, atol=1e-4)
        cosines = towers.encode_images(pixels) @ one.T
        assert torch.allclose(logits, towers.scale * cosines, atol=1e-4)


def test_alone_nothing_is_gathered():
    rows = drawn(3, 2, 0)
    assert gathered(rows) is rows


WORLD = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + ".meet", rank=rank, world_size=2)
from foveal.backbones.towers import gathered
from foveal.methods.language.clip import contrastive_loss
torch.manual_seed(0)
a, b, w = torch.randn(7, 5), torch.randn(7, 6), torch.randn(5, 4)
v, s = torch.randn(6, 4), torch.tensor(2.0)
leaves = [each.requires_grad_() for each in (w, v, s)]
rows = slice(rank, None, 2)
loss = contrastive_loss(gathered(a[rows] @ w), gathered(b[rows] @ v), s.exp())
(loss * (len(a[rows]) / 7 * 2)).backward()
found = [each.grad.clone() for each in leaves]
for each in found:
    dist.all_reduce(each)
if rank == 0:
    for each in leaves:
        each.grad = None
    alone = contrastive_loss(a @ w, b @ v, s.exp())
    alone.backward()
    torch.save([float(alone), float(loss), [(each / 2, leaf.grad) for each, leaf in zip(found, leaves)]], sys.argv[1])
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes are made by fork, which Windows lacks")
def test_two_processes_with_unequal_shares_have_the_gradients_of_one(tmp_path: Path):
    out = tmp_path / "found.pt"
    script = WORLD.format(root=str(Path(__file__).parents[3]))
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=120)
    assert out.exists(), done.stderr
    alone, together, gradients = torch.load(out, weights_only=True)
    assert together == pytest.approx(alone, abs=1e-6)
    for theirs, ours in gradients:
        assert torch.allclose(theirs, ours, atol=1e-5)


def test_the_card_names_the_class():
    assert catalogue.get("clip") is Clip
    assert isinstance(catalogue.create("clip").options, Options)
    with pytest.raises(UsageError, match="batch_size=1"):
        catalogue.create("clip:batch_size=1")
