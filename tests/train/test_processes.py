"""Two processes (gloo, on a CPU) train as one does: losses, gradients, weights, and checkpoints of either."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.fellow import RECIPE, recorded
from torch import Tensor

import foveal
from foveal.train import checkpoint

FELLOW = Path(__file__).with_name("fellow.py")
BIN = Path(sys.executable).parent
STEPS = 3 * RECIPE.epochs
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "accelerate": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


def started(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHERS[launcher], *([free_port()] if launcher == "accelerate" else []), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal up to the rounding of sums taken in another order."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda told, n=name: f"{n}: {told}")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    done = started("torchrun", FELLOW, tmp_path / "two", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    two, one = load_file(tmp_path / "result"), recorded(tmp_path / "one")
    assert len(one["losses"]) == STEPS
    assert one["losses"][-1] < one["losses"][0]
    assert sum(name.startswith("gradient.backbone.0.weight") for name in one) == STEPS
    assert_alike(one, two)


def test_started_with_one_and_gone_on_with_two(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole")
    recorded(tmp_path / "work", budget_s=1e-9)
    done = started("torchrun", FELLOW, tmp_path / "work", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    rest = load_file(tmp_path / "result")
    assert len(rest["losses"]) == STEPS - 1
    torch.testing.assert_close(rest["losses"], whole["losses"][1:], rtol=1e-4, atol=1e-5)
    assert_alike(*({k: v for k, v in run.items() if k.startswith("weight")} for run in (whole, rest)))


def test_one_of_two_dies_and_one_alone_goes_on(tmp_path: Path) -> None:
    kill_at = 7
    done = started("torchrun", FELLOW, tmp_path / "work", tmp_path / "result", kill_at)
    assert done.returncode not in (0, None)
    assert not (tmp_path / "result").exists()
    assert [file.name for file in (tmp_path / "work").iterdir()] == [checkpoint.NAME]
    whole, rest = recorded(tmp_path / "whole"), recorded(tmp_path / "work")
    assert len(rest["losses"]) == STEPS - 6  # two epochs were kept
    torch.testing.assert_close(rest["losses"], whole["losses"][6:], rtol=1e-4, atol=1e-5)
    assert_alike(*({k: v for k, v in run.items() if k.startswith("weight")} for run in (whole, rest)))


def test_accelerate_launch_fits_with_two(photos: Path, cache: Path, tiny: str, tmp_path: Path) -> None:
    """The documented command: two processes, one Bundle, one of them talks."""
    options = ["--method", "full:epochs=2,batch_size=16", "--backbone", tiny, "--device", "cpu", "--json"]
    done = started("accelerate", "-m", "foveal", "fit", photos, *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert [entry.name for entry in tmp_path.iterdir()] == ["two"]
    method, backbone = "full:epochs=2,batch_size=16", tiny
    one = foveal.fit(str(photos), method=method, backbone=backbone, device="cpu", out=tmp_path / "one")
    two = foveal.load(tmp_path / "two")
    for ours, theirs in zip(one.metrics["history"], two.metrics["history"], strict=True):
        for name in ("train_loss", "val_loss"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3)
    assert two.metrics["balanced_accuracy"]["value"] == pytest.approx(one.metrics["balanced_accuracy"]["value"])


def test_frozen_features_need_one_writer(photos: Path, cache: Path, tiny: str, tmp_path: Path) -> None:
    options = ["--method", "linear", "--backbone", tiny, "--out", tmp_path / "b", "--json"]
    done = started("torchrun", "-m", "foveal", "fit", photos, *options)
    assert done.returncode == 0, done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]
    json.loads(done.stdout)
