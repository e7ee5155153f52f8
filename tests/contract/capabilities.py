"""What the contract batteries share: the kinds of backbones, and the table of what works on them."""

import json
import os
from pathlib import Path

from torch import nn

from foveal.core import catalogue

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


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(each, kind)) for each in module.modules() for kind in kinds)
