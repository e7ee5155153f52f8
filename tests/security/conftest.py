import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import foveal


class Payload:
    """Unpickled, it makes a folder: proof that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that only a payload makes; it must not be there in the end."""
    place = tmp_path / "owned"
    yield place
    assert not place.exists(), "a payload ran"


@pytest.fixture
def payload(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


@pytest.fixture(scope="session")
def frozen(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bundle of a head on frozen features."""
    return foveal.fit(str(photos), method="linear", out=tmp_path_factory.mktemp("bundles") / "frozen").path


@pytest.fixture(scope="session")
def trained(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bundle of a small backbone that was trained itself."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", pretrained=False).state_dict(), folder / "w.safetensors")
    backbone = f"test_efficientnet@{folder / 'w.safetensors'}"
    return foveal.fit(str(photos), method="full:epochs=1", backbone=backbone, out=folder / "trained").path


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"))

    return copy


@contextmanager
def within(seconds: float, mebibytes: int) -> Iterator[None]:
    """Fails when the block's memory grew by more, or when it took longer (a stuck call ends the test run)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch = threading.Timer(seconds, lambda: os._exit(99))
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown <= mebibytes, f"{grown} MiB more memory, expected at most {mebibytes}"
