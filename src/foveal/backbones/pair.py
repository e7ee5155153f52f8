"""A student beside a frozen teacher: both answer the same images, and the teacher is proven not to have changed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone
from foveal.backbones.recorder import recording
from foveal.backbones.wrapper import check_mode
from foveal.core.errors import BackboneError, FovealError, UsageError
from foveal.core.method import Classifier


class Frozen(nn.Module):
    """A copy of a network that answers and never learns: in eval mode whatever its parent is told, without gradients.

    Raises:
        UsageError: the network is in training mode.
    """

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        check_mode(network)
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.before = state_hash(self.network)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def check(self) -> None:
        """
        Raises:
            FovealError: a weight or a buffer is not what it was at the start.
        """
        if state_hash(self.network) != self.before:
            raise FovealError("the teacher changed while its student learnt: this is a fault of the method, report it")


class Pair(nn.Module):
    """Images -> what student and teacher answer for them.

    Attributes:
        student: trains.
        teacher: `Frozen`, or None.
        connector: maps [B, C, h, w] of what the student pools -> maps [B, D, h, w] in the space of the teacher's
            features; trains with the student and is not part of it. Through it the teacher's classifier reads the
            student.
        layers: names of modules in either network whose outputs are wanted too.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        connector: nn.Module | None = None,
        *,
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] = (),
    ) -> None:
        """
        Raises:
            UsageError: the teacher is in training mode.
            BackboneError: there is a connector, and the teacher's classifier is not one linear layer, or what the
                student pools is computed outside of any of its layers.
        """
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else Frozen(teacher)
        self.connector = connector
        self.layers = {"student": list(student_layers), "teacher": list(teacher_layers)}
        self.pooled = ""
        if connector is not None:
            linear_head(teacher)
            self.pooled = last_map(student)[0]

    def forward(self, images: Tensor, teacher_images: Tensor | None = None) -> dict[str, Tensor]:
        """Images [B, 3, H, W] for the student and [B, 3, h, w] for the teacher, each normalised as it expects.

        Returns:
            logits [B, C] of the student; with a teacher teacher_features [B, D] and teacher_logits [B, K], without
            gradient; with a connector features [B, D], the student's in the teacher's space, and crossed_logits
            [B, K], the teacher's classifier on them; and 'student:NAME', 'teacher:NAME' for each layer.
        """
        wanted = self.layers["student"] + ([self.pooled] if self.connector is not None else [])
        with recording(self.student, wanted, graph=True) as seen:
            found = {"logits": self.student(images)}
        found |= {f"student:{name}": seen[name] for name in self.layers["student"]}
        if self.teacher is None:
            return found
        if teacher_images is None:
            raise UsageError("a pair with a teacher needs teacher_images: the batch as the teacher expects it")
        network: Any = self.teacher.network
        with recording(network, self.layers["teacher"]) as taught:
            found["teacher_features"] = network.features(teacher_images)
            found["teacher_logits"] = network.head(found["teacher_features"])
        found |= {f"teacher:{name}": taught[name] for name in self.layers["teacher"]}
        if self.connector is not None:
            maps = positions(seen[self.pooled], backbone_of(self.student))
            found["features"] = self.connector(maps).mean((2, 3))
            found["crossed_logits"] = F.linear(found["features"], network.head.weight, network.head.bias)
        return found

    def take_student(self) -> Classifier:
        """
        Raises:
            FovealError: the teacher changed.
        """
        if self.teacher is not None:
            self.teacher.check()
        return self.student


def state_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, those included that a state dict leaves out."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def backbone_of(model: Classifier) -> Backbone:
    """
    Raises:
        BackboneError: something other than a backbone makes its features.
    """
    if not isinstance(model.backbone, Backbone):
        raise BackboneError(f"the features of {type(model).__name__} do not come from a plain backbone: expected one")
    return model.backbone


def last_map(model: Classifier) -> tuple[str, int]:
    """The layer that a classifier's backbone pools, by its name in the classifier, and its channels.

    Raises:
        BackboneError: it is computed outside of any layer.
    """
    backbone, training = backbone_of(model), model.training
    blank = next(model.parameters()).new_zeros(1, 3, backbone.preprocessing.size, backbone.preprocessing.size)
    model.eval()
    try:
        name = f"backbone.model.{backbone.map_layer()}"
        with recording(model, [name]) as seen:
            model(blank)
    finally:
        model.train(training)
    return name, positions(seen[name], backbone).shape[1]


def linear_head(model: Classifier | None) -> nn.Linear:
    """
    Raises:
        BackboneError: the classifier is not one linear layer.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise BackboneError(
            f"the teacher answers through {type(head).__name__}, expected a single linear layer: fit a teacher with "
            "--method linear, full or lora"
        )
    return head


def positions(output: Tensor, backbone: Backbone) -> Tensor:
    """What a backbone pools -> [B, C, h, w] whose mean over places is what its features are made of: maps, patch tokens
    as one column, or the class token where that alone is read."""
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if backbone.channels_last else output
    prefix = int(getattr(backbone.model, "num_prefix_tokens", 0))
    return (output[:, :1] if backbone.reads_class_token else output[:, prefix:]).mT[..., None]
