"""What the contract batteries share: the kinds of backbones, and the table of what works on them."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from foveal.backbones.adapter import Backbone, Plan, build, load_backbone
from foveal.core import catalogue
from foveal.core.preprocessing import Preprocessing

CAPABILITIES = Path(__file__).resolve().parents[2] / "docs" / "methods" / "capabilities.json"
FAMILIES = ("cnn", "vit", "windowed", "hybrid")


def as_documented(name: str, family: str, found: str) -> None:
    """What the battery found is what the docs say; with FOVEAL_WRITE_CAPABILITIES=1 (`make capabilities`), write it."""
    if name not in catalogue.families():  # of another package, which keeps its findings where it likes
        return
    known = json.loads(CAPABILITIES.read_text(encoding="utf-8")) if CAPABILITIES.exists() else {}
    if os.environ.get("FOVEAL_WRITE_CAPABILITIES") == "1":
        known.setdefault(name, {})[family] = found
        CAPABILITIES.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    assert known.get(name, {}).get(family) == found, "docs/methods/capabilities.json is out of date: make capabilities"


def backbone_of(family: str, size: int = 64) -> Backbone:
    """A small backbone of one of FAMILIES, its weights drawn anew and always the same."""
    torch.manual_seed(0)
    if family == "windowed":
        args = {"img_size": size, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
        preprocessing = Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
        plan = Plan("swin", "swin_tiny_patch4_window7_224", args, preprocessing, 32, "random")
        return Backbone(plan, build(plan)).eval()
    name = {"cnn": "test_efficientnet", "vit": "test_vit", "hybrid": "test_coatnet"}[family]
    return load_backbone(name, pretrained=False, size=size).eval()


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(each, kind)) for each in module.modules() for kind in kinds)
