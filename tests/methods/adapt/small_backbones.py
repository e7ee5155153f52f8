"""Backbones of a few thousand random weights."""

from __future__ import annotations

from typing import Any

import torch

from foveal.backbones.adapter import Backbone, Plan, build
from foveal.core.preprocessing import Preprocessing

SMALL = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)


def small_vit(depth: int = 3, width: int = 64, seed: int = 0, **args: Any) -> Backbone:
    """A plain ViT on 32 pixels with 16 patches, every weight random."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": depth, "num_heads": 2, **args}
    return random_backbone("vit_tiny_patch16_224", width, seed, **shape)


def small_cnn(seed: int = 0) -> Backbone:
    """A convolutional network with batch norm, depthwise and 1x1 convolutions."""
    return random_backbone("test_efficientnet", 256, seed)


def small_pvt(seed: int = 0) -> Backbone:
    """A pyramid whose attention makes its queries by one layer, its keys and values by another."""
    shape = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}
    return random_backbone("pvt_v2_b0", 32, seed, **shape)


def random_backbone(arch: str, width: int, seed: int, **args: Any) -> Backbone:
    plan = Plan("small", arch, args, SMALL, width, "random")
    torch.manual_seed(seed)
    backbone = Backbone(plan, build(plan))
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return backbone.eval()


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def steps(method: Any, model: Any, count: int = 3) -> None:
    """A few optimiser steps on random images."""
    recipe = method.recipe()
    optimizer = torch.optim.AdamW(method.parameter_groups(model, recipe), lr=recipe.lr)
    for step in range(count):
        model.train()
        labels = torch.arange(6) % model.head.out_features
        batch = {"images": images(6, step), "labels": labels, "class_weights": torch.ones(model.head.out_features)}
        optimizer.zero_grad()
        method.loss(model, batch)["loss"].backward()
        optimizer.step()
