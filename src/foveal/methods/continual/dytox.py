"""DyTox (Douillard et al., CVPR 2022, arXiv 2111.11326): one learnt token and one small head for each batch of classes.

A decoder reads the patch tokens or map cells X of an image once for every token theta_i, with theta_i the only query,

    e_i = TAB(theta_i, [theta_i ; X]),    logits = [head_1(e_1) ; ... ; head_t(e_t)],

and no task number is asked for. Old tokens and heads are frozen; what all share is held by a memory of old images and
(1 - a) L_class + a L_kd + lambda L_div, a = C_old / C: distillation from the model before, and a throw-away head that
tells new classes from 'any old'. Then all but the encoder learns on equally many images of each class.

It needs labels, some images of the old classes, and a last map or patch tokens. `shared=learn` is the paper: encoder
and decoder go on learning, and old answers move. The default, `shared=frozen`, is ours: the encoder stays and each
update has a decoder of its own, so earlier logits cannot move by a bit; so do Bundles of other methods learn new
classes, their head as it is. `objective=softmax` is ours too, as such heads were trained that way (the paper's:
`sigmoid`). Width and recipe are made for hundreds of images; MixUp (DyTox+) and SAM (DyTox++) are left out.
The paper's encoder is `foveal.blocks.gated.GatedEncoder`.

When not to use it: when all old images are at hand, fit anew on everything; with `shared=frozen`, when the new classes
look like nothing the backbone can tell apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveal.blocks.gated import shared_by
from foveal.core.errors import UsageError
from foveal.core.families.continual import Continual, Stage
from foveal.core.method import Classifier, Recipe, Spec, method
from foveal.core.options import option, options

HEAD_WIDTH = 32
"""Numbers of the decoder's width that each attention head reads, as in the paper (384 over 12)."""
DECAY = 1e-6


def distillation(new: Float[Tensor, "B C"], old: Float[Tensor, "B C"], tau: float = 1.0) -> Float[Tensor, ""]:
    """KL(softmax(old / tau) || softmax(new / tau)) tau^2, averaged over images and classes: a C-th of what is usually
    meant, as in the authors' code."""
    kept, wanted = (new / tau).log_softmax(1), (old / tau).log_softmax(1)
    return (wanted.exp() * (wanted - kept)).mean() * tau**2


def either(
    logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"], objective: Literal["softmax", "sigmoid"]
) -> Float[Tensor, ""]:
    """Cross-entropy, or binary cross-entropy with one-hot targets averaged over images and classes."""
    if objective == "softmax":
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits))


class TaskAttention(nn.Module):
    """The task-attention block: a token [D] and cells [B, n, D] -> an embedding [B, D]; the token alone asks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = shared_by(width, heads)
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, token: Tensor, cells: Tensor) -> Tensor:
        asked = token.expand(cells.shape[0], 1, -1)
        read = self.norm(torch.cat([asked, cells], 1))
        q, k, v = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each in (self.q(read[:, :1]), self.k(read), self.v(read))
        )
        found = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        answer = token + self.proj(found.transpose(1, 2).flatten(2))[:, 0]
        return answer + self.mlp(self.norm_mlp(answer))


class Decoder(nn.Module):
    """Cells [B, n, C] -> one embedding for each token [B, T, D], by the same block."""

    def __init__(self, cells: int, width: int) -> None:
        super().__init__()
        self.project = nn.Identity() if cells == width else nn.Linear(cells, width)
        self.attention = TaskAttention(width, max(1, width // HEAD_WIDTH))
        self.tokens = nn.ParameterList()
        self.width = width

    def add(self) -> None:
        """One more token."""
        self.tokens.append(nn.Parameter(nn.init.trunc_normal_(torch.empty(self.width), std=0.02)))

    def forward(self, cells: Tensor) -> Tensor:
        read = self.project(cells)
        return torch.stack([self.attention(token, read) for token in self.tokens], 1)


class Joint(nn.Module):
    """What was there before and a head for each token: features [B, D_0 + D_1 + ...] -> logits [B, C]."""

    def __init__(self, base: nn.Module | None, base_width: int) -> None:
        super().__init__()
        self.base = base
        self.tasks = nn.ModuleList()
        self.widths = [base_width]

    def add(self, width: int, classes: int) -> None:
        self.tasks.append(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)))
        self.widths.append(width)

    def forward(self, features: Tensor) -> Tensor:
        before, *embeddings = features.split(self.widths, 1)
        logits = [] if self.base is None else [self.base(before.contiguous())]
        return torch.cat([*logits, *(head(e) for head, e in zip(self.tasks, embeddings, strict=True))], 1)


class Expanded(Classifier):
    """A classifier that classes were added to: normalised images [B, 3, H, W] -> logits [B, C], in order of coming.

    Attributes:
        decoders: each reads the cells for the tokens it holds.
    """

    def __init__(self, backbone: Any, base: nn.Module | None) -> None:
        super().__init__(backbone, Joint(base, 0 if base is None else backbone.width))
        self.decoders = nn.ModuleList()

    def add(self, classes: int, width: int, fresh: bool) -> None:
        """Room for a batch of classes: a token, in a decoder of its own (`fresh`) or in the last one, and a head."""
        if classes < 1:
            raise UsageError(f"a batch of {classes} new classes: expected at least 1")
        backbone: Any = self.backbone
        joint: Any = self.head
        if fresh or not len(self.decoders):
            self.decoders.append(Decoder(backbone.cell_width, width))
        last: Any = self.decoders[-1]
        last.add()
        joint.add(last.width, classes)

    @property
    def width(self) -> int:
        joint: Any = self.head
        return sum(joint.widths)

    def features(self, images: Tensor) -> Tensor:
        backbone: Any = self.backbone
        return self.embed(*backbone.features_and_cells(images))

    def embed(self, pooled: Tensor, cells: Tensor) -> Tensor:
        """Pooled features [B, D_0] and cells [B, n, C] -> what the heads read.

        Raises:
            UsageError: nothing has been learnt yet.
        """
        joint: Any = self.head
        parts = [] if joint.base is None else [pooled]
        parts += [decoder(cells).flatten(1) for decoder in self.decoders]
        if not parts:
            raise UsageError("a model without a class cannot answer: add its first classes")
        return torch.cat(parts, 1)


def newest(model: Any) -> int:
    """How many classes came last."""
    return model.head.tasks[-1][1].out_features


class Learner(nn.Module):
    """What is trained in one stage: the grown model, beside it the model before and a throw-away head."""

    def __init__(self, model: Expanded, teacher: Classifier | None, still: Sequence[nn.Module], diverge: bool) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.still = [*still, *([teacher] if teacher else [])]  # a plain list: the model registers its parts itself
        self.last: int = model.head.widths[-1]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        odd = nn.Sequential(nn.LayerNorm(self.last), nn.Linear(self.last, newest(model) + 1))
        self.divergence = odd if diverge else None

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        for each in self.still:
            each.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`logits` [B, C], and where there are any `teacher` [B, C_old] and `divergence` [B, C_new + 1]."""
        if "cells" in batch:
            fresh: Any = self.model.decoders[-1]
            features = torch.cat([batch["known"], fresh(batch["cells"]).flatten(1)], 1)
        else:
            features = self.model.features(batch["images"])
        found = {"logits": self.model.head(features)}
        if self.teacher is not None:
            with torch.no_grad():
                found["teacher"] = self.teacher(batch["images"])
        if self.divergence is not None:
            found["divergence"] = self.divergence(features[:, -self.last :])
        return found


@options
class Options:
    """What `dytox` can be told."""

    shared: Literal["frozen", "learn"] = option("frozen", "what old answers rest on: stays, or goes on learning")
    objective: Literal["softmax", "sigmoid"] = option("softmax", "one answer for all classes, or one for each")
    width: int = option(192, "width of a decoder, a multiple of 32 (the paper's: 384)", ge=32, le=1024, multiple_of=32)
    distil: float = option(1.0, "weight of the distillation, times C_old / C (shared=learn)", ge=0, le=1000)
    divergence: float = option(0.1, "weight of telling new classes from any old one", ge=0, le=1000)
    epochs: int = option(60, "passes over new images and memory (the paper's: 500)", ge=1, le=10_000)
    balance: int = option(20, "passes over equally many images of each class, at a tenth of the rate", ge=0, le=10_000)
    lr: float = option(1e-3, "learning rate", gt=0, le=1)
    batch_size: int = option(32, "images per step", ge=2, le=65536)
    augment: Literal["none", "light", "strong"] = option("light", "random crops and mirror images (shared=learn)")


@method(
    Spec(
        family="continual",
        title="DyTox: dynamic token expansion",
        year=2022,
        arxiv="2111.11326",
        needs=frozenset({"labels", "feature map"}),
    ),
    Options,
)
class Dytox(Continual):
    def first(self, encoder: Any, classes: int) -> Expanded:
        """A model of its first classes on an encoder that learns with it, such as `GatedEncoder`."""
        model = Expanded(encoder, None)
        model.add(classes, encoder.cell_width, fresh=True)
        return model

    def grow(self, model: Classifier, classes: int) -> Expanded:
        """
        Raises:
            UsageError: no class to add, or a model whose features are not its backbone's.
        """
        chosen: Options = self.options
        if isinstance(model, Expanded):
            grown = copy.deepcopy(model)
        elif type(model).features is Classifier.features and hasattr(model.backbone, "features_and_cells"):
            grown = Expanded(copy.deepcopy(model.backbone), copy.deepcopy(model.head))
        else:
            raise UsageError(
                f"dytox cannot add classes to a {type(model).__name__}, which makes its features in its own way: "
                "fit with a frozen-feature method, full, lora or attention-only"
            )
        grown.add(classes, chosen.width, fresh=chosen.shared == "frozen")
        return grown.eval()

    def recipe(self) -> Recipe:
        chosen: Options = self.options
        return Recipe(chosen.epochs, chosen.batch_size, chosen.lr, DECAY, augment=chosen.augment)

    def stages(self) -> tuple[Stage, ...]:
        chosen: Options = self.options
        learn = Stage("learn", self.recipe())
        if not chosen.balance:
            return (learn,)
        slow = Recipe(chosen.balance, chosen.batch_size, chosen.lr / 10, DECAY, augment=chosen.augment)
        return learn, Stage("balance", slow, balanced=True)

    def update(self, old: Classifier | None, grown: Any, stage: Stage) -> Learner:
        """`old` is None for the first classes of a model that learns its encoder too."""
        chosen: Options = self.options
        moving = chosen.shared == "learn" and not stage.balanced
        grown.requires_grad_(False)
        trained = [grown.decoders[-1].tokens[-1], *grown.head.tasks[-1].parameters()]
        decoders = grown.decoders if chosen.shared == "learn" else grown.decoders[-1:]
        for decoder in decoders:
            trained += [*decoder.project.parameters(), *decoder.attention.parameters()]
        if moving:
            trained += [*grown.backbone.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        distils = old if moving and chosen.distil else None
        teacher = copy.deepcopy(distils).requires_grad_(False).eval() if distils else None
        diverge = old is not None and not stage.balanced and chosen.divergence > 0
        return Learner(grown, teacher, [] if moving else [grown.backbone], diverge)

    @torch.no_grad()
    def given(self, grown: Any, images: Tensor) -> Mapping[str, Tensor] | None:
        """With `shared=frozen`: the cells, and what all but the last decoder make of them."""
        if self.options.shared == "learn":
            return None
        pooled, cells = grown.backbone.features_and_cells(images)
        known = [] if grown.head.base is None else [pooled]
        known += [decoder(cells).flatten(1) for decoder in grown.decoders[:-1]]
        return {"known": torch.cat(known, 1), "cells": cells}

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen: Options = self.options
        found = model(batch)
        logits, labels = found["logits"], batch["labels"]
        learner = getattr(model, "module", model)
        new = newest(learner.model)
        share = (logits.shape[1] - new) / logits.shape[1]
        parts = {"class": either(logits.float(), labels, chosen.objective)}
        total = parts["class"]
        if "teacher" in found:
            parts["distil"] = distillation(logits[:, :-new].float(), found["teacher"].float())
            total = (1 - share) * total + chosen.distil * share * parts["distil"]
        if "divergence" in found:
            target = (labels - (logits.shape[1] - new) + 1).clamp_min(0)
            parts["divergence"] = either(found["divergence"].float(), target, "sigmoid")
            total = total + chosen.divergence * parts["divergence"]
        return {"loss": total, **parts}

    def finish(self, model: Learner) -> Expanded:
        return model.model.requires_grad_(False)

    def plan(self, old: Classifier, grown: Any) -> dict[str, Any]:
        return {"classes": newest(grown)}

    def added(self, plan: Mapping[str, Any]) -> int:
        classes = plan.get("classes")
        if not isinstance(classes, int) or isinstance(classes, bool) or not 1 <= classes <= 100_000:
            raise UsageError(f"a plan of dytox says classes={classes}: expected a number from 1 to 100,000")
        return classes

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Expanded:
        return self.grow(model, self.added(plan))
