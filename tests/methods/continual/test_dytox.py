"""dytox: parameter counts, the block and the losses by other means, and what must not move."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.adapter import load_backbone
from foveal.blocks.gated import GatedEncoder
from foveal.core.errors import UsageError
from foveal.core.method import Classifier
from foveal.methods.adapt.vpt import Vpt
from foveal.methods.continual.dytox import (
    Dytox,
    Expanded,
    Joint,
    Options,
    TaskAttention,
    distillation,
    either,
)

SMALL = {"width": 32, "augment": "none"}


def paper(**given: object) -> Dytox:
    return Dytox(Options(shared="learn", objective="sigmoid", **{**SMALL, **given}))  # type: ignore[arg-type]


def scratch(classes: int = 2) -> Expanded:
    torch.manual_seed(0)
    return paper().first(GatedEncoder(16, 4, 32, 1, 2), classes).eval()


def fitted(classes: int = 3) -> Classifier:
    """An ordinary classifier, as `foveal fit` makes it."""
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", pretrained=False, size=64)
    return Classifier(backbone, nn.Linear(backbone.width, classes)).eval()


def images(count: int = 5, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def test_the_papers_network_has_the_papers_parameters():
    with torch.device("meta"):
        method = paper(width=384)
        model = method.first(GatedEncoder(), 10)
        assert count(model) == 10_683_564 + 5_002
        for _ in range(9):
            model.add(10, 384, fresh=False)
        assert count(model) == 10_733_584
        for classes, more in ((5, 3_077), (2, 1_922)):
            before = count(model)
            model.add(classes, 384, fresh=False)
            assert count(model) - before == more


def naive_attention(block: TaskAttention, token: Tensor, cells: Tensor) -> Tensor:
    """One image, one head, one number at a time."""
    answers = []
    for image in cells:
        rows = [block.norm(row) for row in (token, *image)]
        width, each = len(token), len(token) // block.heads
        q = block.q(rows[0])
        keys, values = [block.k(row) for row in rows], [block.v(row) for row in rows]
        found = torch.zeros(width, dtype=token.dtype)
        for head in range(block.heads):
            part = slice(head * each, (head + 1) * each)
            scores = torch.stack([(q[part] * key[part]).sum() / math.sqrt(each) for key in keys])
            weights = scores.exp() / scores.exp().sum()
            found[part] = sum((w * v[part] for w, v in zip(weights, values, strict=True)), torch.zeros(each))
        one = token + block.proj(found)
        answers.append(one + block.mlp(block.norm_mlp(one)))
    return torch.stack(answers)


def test_the_task_attention_block_in_loops_gradients_too():
    torch.manual_seed(0)
    block = TaskAttention(12, 3).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    token = torch.randn(12, dtype=torch.float64, requires_grad=True)
    cells = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = block(token, cells), naive_attention(block, token, cells)
    assert torch.allclose(ours, theirs, atol=1e-10)
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), (token, cells)),
        torch.autograd.grad(theirs.square().sum(), (token, cells)),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-8)


def test_distillation_is_a_mean_over_images_and_classes():
    new, old = torch.randn(2, 4, 6, dtype=torch.float64)
    for tau in (1.0, 2.5):
        p, q = (old / tau).softmax(1), (new / tau).softmax(1)
        total = sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for i in range(4) for k in range(6))
        assert float(distillation(new, old, tau)) == pytest.approx(float(total) / 24 * tau**2, rel=1e-10)
    assert float(distillation(old, old)) == 0.0
    infinite = torch.tensor([[0.0, -200.0]])
    assert torch.isfinite(distillation(infinite, -infinite))


def test_the_class_loss_by_hand():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    hot = F.one_hot(labels, 3).float()
    by_hand = -(hot * logits.sigmoid().log() + (1 - hot) * (1 - logits.sigmoid()).log()).mean()
    assert float(either(logits, labels, "sigmoid")) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(either(logits, labels, "softmax")) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)


@pytest.mark.parametrize("old", [scratch, fitted], ids=["scratch", "fitted"])
@pytest.mark.parametrize("shared", ["learn", "frozen"])
def test_old_logits_are_bit_equal_after_growing(old, shared: str):
    model, x = old(), images(size=64 if old is fitted else 16)
    method = Dytox(Options(shared=shared, **SMALL))  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first, grown = model(x), method.grow(model, 2)
        again = method.grow(grown, 1)
        assert torch.equal(grown(x)[:, :-2], first)
        assert torch.equal(again(x)[:, :-1], grown(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = 1 + (0 if old is fitted else 1) if shared == "frozen" else 1
    assert len(grown.decoders) == fresh


def test_the_encoder_runs_once_and_the_decoder_once_for_each_token():
    model = scratch()
    for _ in range(3):
        model = paper().grow(model, 2)
    calls = {"encoder": 0, "decoder": 0}
    handles = [
        model.backbone.blocks[0].register_forward_hook(lambda *_: calls.__setitem__("encoder", calls["encoder"] + 1)),
        model.decoders[0].attention.register_forward_hook(
            lambda *_: calls.__setitem__("decoder", calls["decoder"] + 1)
        ),
    ]
    model(images())
    for handle in handles:
        handle.remove()
    assert calls == {"encoder": 1, "decoder": 4}


def test_changing_the_order_of_tasks_changes_the_order_of_logits():
    model = paper().grow(paper().grow(scratch(), 3), 1)
    x = images()
    with torch.no_grad():
        blocks = model(x).split([2, 3, 1], 1)
        other = copy.deepcopy(model)
        order = [2, 0, 1]
        tokens, heads = list(other.decoders[0].tokens), list(other.head.tasks)
        other.decoders[0].tokens = nn.ParameterList([tokens[i] for i in order])
        other.head.tasks = nn.ModuleList([heads[i] for i in order])
        assert torch.allclose(other(x), torch.cat([blocks[i] for i in order], 1), atol=1e-6)


@pytest.mark.parametrize("shared", ["learn", "frozen"])
@pytest.mark.parametrize("balance", [False, True])
def test_only_what_may_learn_gets_a_gradient(shared: str, balance: bool):
    old = paper().grow(scratch(), 2)
    method = Dytox(Options(shared=shared, objective="sigmoid", **SMALL))  # type: ignore[arg-type]
    grown = method.grow(old, 3)
    stage = method.stages()[int(balance)]
    assert stage.balanced == balance
    learner = method.update(old, grown, stage).train()
    method.loss(learner, {"images": images(7), "labels": torch.arange(7)})["loss"].backward()
    moved = {name for name, each in learner.named_parameters() if each.grad is not None}
    own = "model.decoders.1" if shared == "frozen" else "model.decoders.0"
    token = f"{own}.tokens.{0 if shared == 'frozen' else 2}"
    assert token in moved
    assert "model.head.tasks.2.1.weight" in moved
    assert not any(name.startswith(("model.head.tasks.0", "model.head.tasks.1", "teacher")) for name in moved)
    assert not any("tokens" in name for name in moved - {token})
    assert any(name.startswith("model.backbone") for name in moved) == (shared == "learn" and not balance)
    assert any(name.startswith(f"{own}.attention") for name in moved)
    assert ("divergence.1.weight" in moved) == (not balance)
    assert (learner.teacher is not None) == (shared == "learn" and not balance)
    assert learner.teacher is None or not learner.teacher.training
    kept = method.finish(learner)
    assert isinstance(kept, Expanded)
    assert not any(each.requires_grad for each in kept.parameters())


@pytest.mark.parametrize(("old", "new", "share"), [(2, 2, 0.5), (4, 2, 2 / 3)])
def test_the_loss_is_the_papers_by_hand(old: int, new: int, share: float):
    before = scratch(old)
    method = paper(divergence=0.3)
    grown = method.grow(before, new)
    learner = method.update(before, grown, method.stages()[0])
    with torch.no_grad():
        learner.teacher.head.tasks[0][1].bias += 0.5  # type: ignore[union-attr, index, operator]
    x, labels = images(6), torch.tensor([0, 1, old, old + new - 1, old, 1])
    found = method.loss(learner, {"images": x, "labels": labels})
    logits, teacher = grown(x), learner.teacher(x)  # type: ignore[misc]
    assert learner.divergence is not None
    odd = learner.divergence(grown.features(x)[:, -32:])
    target = torch.where(labels < old, 0, labels - old + 1)
    expected = (
        (1 - share) * either(logits, labels, "sigmoid")
        + share * distillation(logits[:, :old], teacher)
        + 0.3 * F.binary_cross_entropy_with_logits(odd, F.one_hot(target, new + 1).float())
    )
    assert float(found["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("old", [scratch, fitted], ids=["scratch", "fitted"])
def test_what_is_given_in_place_of_images_leads_to_the_same(old):
    method = Dytox(Options(**SMALL))  # type: ignore[arg-type]
    model = old()
    grown = method.grow(method.grow(model, 1), 2)
    x = images(4, 64 if old is fitted else 16)
    given = method.given(grown, x)
    assert given is not None
    assert paper().given(grown, x) is None
    learner = method.update(model, grown, method.stages()[0])
    assert torch.allclose(learner({**given})["logits"], learner({"images": x})["logits"], atol=1e-6)


def test_a_plan_rebuilds_the_structure_and_a_strangers_is_checked():
    method, model = Dytox(Options(**SMALL)), fitted()  # type: ignore[arg-type]
    grown = method.grow(model, 4)
    plan = method.plan(model, grown)
    assert plan == {"classes": 4}
    assert method.added(plan) == 4
    torch.manual_seed(9)
    rebuilt = method.rebuild(fitted(), plan)
    rebuilt.load_state_dict(grown.state_dict())
    x = images(size=64)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), grown(x))
    for wrong in (0, -1, 10**9, "4", True, None, 1.5):
        with pytest.raises(UsageError, match=f"a plan of dytox says classes={wrong}"):
            method.rebuild(model, {"classes": wrong})


def test_what_it_refuses():
    with pytest.raises(UsageError, match="width 32 cannot be shared by 3 attention heads"):
        TaskAttention(32, 3)
    with pytest.raises(UsageError, match="width 32 cannot be shared by 5 attention heads"):
        GatedEncoder(16, 4, 32, 1, 5)
    with pytest.raises(UsageError, match="images of 30 pixels do not cut into patches of 4"):
        GatedEncoder(30, 4, 32, 1, 2)
    with pytest.raises(UsageError, match="images of 16 x 12 pixels: the grid must be square"):
        scratch()(images()[..., :12])
    with pytest.raises(UsageError, match="a batch of 0 new classes: expected at least 1"):
        paper().grow(scratch(), 0)
    with pytest.raises(UsageError, match="a model without a class cannot answer"):
        Expanded(GatedEncoder(16, 4, 32, 1, 2), None)(images())
    assert Joint(None, 0).widths == [0]
    torch.manual_seed(0)
    prompted = Vpt().attach(load_backbone("test_vit", pretrained=False, size=64), 3)
    with pytest.raises(UsageError, match="dytox cannot add classes to a PromptedClassifier"):
        Dytox().grow(prompted, 2)
