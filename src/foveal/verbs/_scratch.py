"""Fitting from random weights: the backbone as its seed makes it, and the methods that would leave it so."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from foveal.backbones.adapter import Backbone, load_backbone
from foveal.core.errors import UsageError
from foveal.core.method import Adapt, Method
from foveal.core.seeds import derive, seed_everything


def random_backbone(name: str, seed: int) -> Backbone:
    """The architecture of a name with random weights; the same for one seed.

    Raises:
        BackboneError: no such architecture.
    """
    seed_everything(derive(seed, "weights"))
    return load_backbone(name, pretrained=False, offline=True)


def learnable(backbone: nn.Module) -> list[nn.Parameter]:
    """What there is to learn; positions that are fixed by construction are not."""
    return [parameter for parameter in backbone.parameters() if parameter.requires_grad]


def must_learn(method: Method, parameters: Iterable[nn.Parameter]) -> None:
    """
    Raises:
        UsageError: the method keeps some of a random backbone's parameters frozen.
    """
    if not all(parameter.requires_grad for parameter in parameters):
        raise keeps(method)


def must_suit(method: Adapt, backbone: Backbone) -> None:
    """`must_learn`, before anything is read.

    Raises:
        UsageError: the method reads frozen features, or freezes some of the backbone.
        BackboneError: the method does not work on this backbone.
    """
    if method.reads_features():
        raise keeps(method)
    twin = copy.deepcopy(backbone)
    parameters = learnable(twin)
    method.attach(twin, 2)
    must_learn(method, parameters)


def keeps(method: Method) -> UsageError:
    return UsageError(
        f"--scratch with {method.name}, which keeps pretrained weights frozen: from random weights they would stay "
        "noise; use a method that trains every parameter, such as full, or leave --scratch out"
    )
