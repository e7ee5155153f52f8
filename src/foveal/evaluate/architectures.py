"""What an architecture costs before it has weights: parameters and multiply-accumulates, and its speed."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch

from foveal.core.errors import FovealError
from foveal.core.folders import atomic_file, cache_root
from foveal.evaluate.cost import BATCH, counted, timed


def architecture_cost(name: str) -> dict[str, int | None]:
    """Parameters of a timm architecture with its own classifier, and multiply-accumulates of one image of its own size.

    Counted on the meta device, where tensors have shapes and no memory, and kept in the cache. Fourier transforms
    are not counted. None where an architecture cannot be built or run without memory.
    """
    key = f"{name} timm {version('timm')} foveal {version('foveal')}"
    file = cache_root() / "architectures" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"parameters": found["parameters"], "macs": found["macs"]}
    cost: dict[str, int | None] = {"parameters": None, "macs": None}
    with suppress(RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError), torch.device("meta"):
        model: Any = create(name)
        cost["parameters"] = sum(p.numel() for p in model.parameters())
        cost["macs"] = counted(model, (1, *model.default_cfg["input_size"]))
    with suppress(FovealError), atomic_file(file) as staging:
        staging.write_text(json.dumps({"of": key, **cost}), encoding="utf-8")
    return cost


def images_per_second(name: str) -> float:
    """Speed of a timm architecture in torch on this machine's CPU, with random weights and images of its own size."""
    model: Any = create(name).eval()
    images = torch.zeros(BATCH, *model.default_cfg["input_size"])
    with torch.inference_mode():
        return round(BATCH / timed(lambda: model(images)), 1)


def create(name: str) -> Any:
    import timm

    import foveal.architectures  # noqa: F401

    return timm.create_model(name, pretrained=False)
