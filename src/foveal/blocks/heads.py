"""Heads in closed form."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Head = TypeVar("Head", bound=nn.Linear)


def linear_head(weight: Tensor, bias: Tensor, kind: type[Head] = nn.Linear) -> Head:
    """A float32 `nn.Linear` (or subclass) that holds weight [C, D] and bias [C]."""
    layer = kind(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
