import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from jaxtyping import install_import_hook
from PIL import Image
from safetensors.torch import save_file

import foveal

install_import_hook("foveal.methods", "beartype.beartype")
"""The shapes in the methods' signatures are checked whenever a test calls them."""

COLOURS = {"blue": 2, "green": 1, "red": 0}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A feature cache of the test run's own, shared by its processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEAL_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three class folders with sixteen JPEG files each; the class can be seen in the colour."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(7)
    for name, channel in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(16):
            (root / name / f"{index:02d}.jpg").write_bytes(tinted(rng, channel))
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small backbone, as --backbone takes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_efficientnet", pretrained=False).state_dict(), path)
    return f"test_efficientnet@{path}"


@pytest.fixture(scope="session")
def colours(photos: Path, cache: Path, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> foveal.Bundle:
    """A Bundle on the small backbone; the class of an image is its colour. Tests that change it take a copy."""
    out = tmp_path_factory.mktemp("bundles") / "colours"
    return foveal.fit(photos, method="linear", backbone=tiny, out=out, offline=True)


def tinted(rng: np.random.Generator, channel: int) -> bytes:
    """A JPEG of random blocks, 90 x 110 pixels, with one channel raised."""
    blocks = rng.integers(0, 120, (9, 11, 3), dtype=np.uint8)
    blocks[..., channel] += rng.integers(60, 130, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((110, 90), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
