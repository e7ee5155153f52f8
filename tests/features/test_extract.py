import io
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.backbones.adapter import Backbone, load_backbone, normalise
from foveal.core.errors import DataError
from foveal.data.dataset import Dataset
from foveal.data.images import decode, to_pixels
from foveal.features import extract as module
from foveal.features.extract import extract


class Memory:
    """Image files held in memory."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def read(self, index: int) -> bytes:
        if self.files[index] == b"gone":
            raise DataError("the file is gone")
        return self.files[index]


def dataset(files: list[bytes]) -> Dataset:
    n = len(files)
    ids = [f"{i:06d}.png" for i in range(n)]
    return Dataset("memory", ids, np.zeros(n, np.int64), ("a",), "single-label", None, Memory(files))


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("test_efficientnet", pretrained=False, size=32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    return tmp_path


def with_torch(backbone: Backbone, files: list[bytes]) -> np.ndarray:
    pixels = np.stack([to_pixels(decode(file), backbone.preprocessing) for file in files])
    with torch.inference_mode():
        return backbone.eval()(normalise(torch.from_numpy(pixels), backbone.preprocessing)).numpy()


def test_features_scan_and_order_are_right(backbone):
    files = [picture(seed, (40 + seed, 30)) for seed in range(45)]
    seen: list[tuple[int, int]] = []
    found = extract(dataset(files), backbone, device="cpu", progress=lambda done, total: seen.append((done, total)))
    expected = with_torch(backbone, files)
    assert found.X.shape == (45, backbone.width)
    assert len(found.X) == 45
    assert np.abs(np.asarray(found.X) - expected).max() <= 1e-3 * np.abs(expected).max()
    assert found.scan["width"].tolist() == [40 + seed for seed in range(45)]
    assert found.scan["ok"].all()
    assert len(set(found.keys)) == 45
    assert (found.engine, found.computed, found.errors) == ("onnxruntime cpu", 45, {})
    assert seen[-1] == (45, 45)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_rows_are_read_by_any_index(backbone):
    files = [picture(seed) for seed in range(20)]
    X = extract(dataset(files), backbone, device="cpu").X
    whole = np.asarray(X)
    mask = np.arange(20) % 3 == 0
    for index in (np.array([5, 1, 1, 19]), slice(3, 9), slice(None, None, -1), mask, [0, 2], np.array([], int)):
        assert np.array_equal(X[index], whole[index])
    assert np.array_equal(X[7], whole[7])
    assert X[7].shape == (backbone.width,)
    assert np.array_equal(X[-1], whole[-1])
    assert np.array_equal(X.take(np.array([4, 2]))[:], whole[[4, 2]])
    assert np.asarray(X, np.float64).dtype == np.float64
    with pytest.raises(IndexError):
        _ = X[20]


def test_second_time_nothing_is_decoded(backbone, monkeypatch):
    files = [picture(seed) for seed in range(20)]
    first = extract(dataset(files), backbone, device="cpu")

    def never(*args: object) -> None:
        raise AssertionError("decoded although the cache has it")

    monkeypatch.setattr(module, "decode", never)
    monkeypatch.setattr(module, "feature_session", never)
    again = extract(dataset(files[::-1]), backbone, device="cpu")
    assert (again.engine, again.computed) == ("cache", 0)
    assert np.array_equal(again.X[::-1], first.X[:])
    assert np.array_equal(again.scan[::-1], first.scan)


def test_only_new_images_are_computed(backbone):
    files = [picture(seed) for seed in range(30)]
    extract(dataset(files[:10]), backbone, device="cpu")
    assert extract(dataset(files), backbone, device="cpu").computed == 20


def test_copies_are_computed_once_and_share_a_row(backbone):
    files = [picture(seed % 3) for seed in range(50)]
    found = extract(dataset(files), backbone, device="cpu")
    assert found.computed == 3
    assert len(set(found.X.where.tolist())) == 3
    assert np.array_equal(found.X[0], found.X[48])


def test_bad_images_are_named_and_the_rest_is_done(backbone):
    files = [picture(0), b"no image", picture(1), b"", b"gone", b"no image", picture(2)[:60]]
    found = extract(dataset(files), backbone, device="cpu")
    assert set(found.errors) == {1, 3, 4, 5, 6}
    assert found.errors[1] == found.errors[5] == "not an image of a known format, or its header is damaged"
    assert found.errors[3] == "the file is empty"
    assert found.errors[4] == "the file is gone"
    assert np.isnan(found.X[1]).all()
    assert np.isfinite(found.X[[0, 2]]).all()
    assert found.scan["ok"].tolist() == [1, 0, 1, 0, 0, 0, 0]
    kept = found.take(np.array([6, 2, 0]))
    assert set(kept.errors) == {0}
    assert np.array_equal(kept.X[1], found.X[2])
    assert kept.keys == [found.keys[i] for i in (6, 2, 0)]
    assert kept.scan["ok"].tolist() == [0, 1, 1]
    assert extract(dataset(files), backbone, device="cpu").errors == found.errors


def test_nothing_decodable_and_nothing_at_all(backbone):
    assert set(extract(dataset([b"x", b"y"]), backbone, device="cpu").errors) == {0, 1}
    empty = extract(dataset([]), backbone, device="cpu")
    assert empty.X.shape == (0, backbone.width)
    assert np.asarray(empty.X).shape == (0, backbone.width)


def test_interruption_keeps_what_was_done(backbone, monkeypatch):
    files = [picture(seed) for seed in range(200)]

    def interrupt(done: int, total: int) -> None:
        if done >= 96:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(dataset(files), backbone, device="cpu", progress=interrupt)
    assert extract(dataset(files), backbone, device="cpu").computed == 200 - 96


def test_damaged_cache_is_filled_again(backbone, own_cache: Path):
    files = [picture(seed) for seed in range(8)]
    first = np.asarray(extract(dataset(files), backbone, device="cpu").X)
    for shard in own_cache.glob("features/*/*.rows"):
        shard.write_bytes(shard.read_bytes()[:-1])
    again = extract(dataset(files), backbone, device="cpu")
    assert again.computed == 8
    assert np.allclose(again.X[:], first, rtol=1e-4, atol=1e-5)


def test_torch_session_gives_the_same(backbone, monkeypatch):
    files = [picture(seed) for seed in range(40)]
    monkeypatch.setattr("foveal.features.session.TOLERANCE", -1.0)
    found = extract(dataset(files), backbone, device="cpu")
    assert found.engine == "torch cpu"
    expected = with_torch(backbone, files)
    assert np.abs(found.X[:] - expected).max() <= 1e-3 * np.abs(expected).max()


RUN = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_extract import dataset, picture
from foveal.backbones.adapter import load_backbone
from foveal.features import extract as module
torch.manual_seed(0)
backbone = load_backbone("test_efficientnet", pretrained=False, size=32)
"""


def run(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN + code, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_process_leaves_what_it_had_written(backbone, own_cache: Path):
    code = (
        "module.FLUSH_ROWS = 16\n"
        "print('ready', flush=True)\n"
        "module.extract(dataset([picture(seed) for seed in range(4000)]), backbone, device='cpu')\n"
    )
    process = run(code)
    until = time.monotonic() + 60
    while len(list(own_cache.glob("features/*/*.rows"))) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = extract(dataset([picture(seed) for seed in range(64)]), backbone, device="cpu")
    assert found.computed == 0
    expected = with_torch(backbone, [picture(seed) for seed in range(64)])
    assert np.abs(found.X[:] - expected).max() <= 1e-3 * np.abs(expected).max()


def test_memory_does_not_grow_with_the_number_of_images():
    code = (
        "files = [picture(seed) for seed in range(40)]\n"
        "peaks = []\n"
        "for copies in (1, 1000):\n"
        "    X = module.extract(dataset(files * copies), backbone, device='cpu').X\n"
        "    X[len(X) // 2]\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(peaks[1] - peaks[0])\n"
    )
    out, errors = run(code).communicate(timeout=120)
    assert out, errors
    kibibytes_per_image = int(out) / 40_000
    assert kibibytes_per_image < 0.6


def test_full_disk_is_one_clear_error(own_cache: Path):
    code = (
        "import signal\n"
        "from foveal.core.errors import FovealError\n"
        "from foveal.features.session import feature_session\n"
        "feature_session(backbone, device='cpu')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    module.extract(dataset([picture(seed) for seed in range(60)]), backbone, device='cpu')\n"
        "except FovealError as error:\n"
        "    print(error)\n"
    )
    out, errors = run(code).communicate(timeout=120)
    assert "no space left on the device" in out, errors
    assert out.count("\n") == 1
    assert not list(own_cache.glob("features/*/.*tmp"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
