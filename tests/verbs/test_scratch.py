"""`foveal fit --scratch`: architectures without pretrained weights, offline; and what would leave them noise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.core import catalogue
from foveal.core.errors import UsageError
from foveal.verbs._scratch import learnable, must_learn, random_backbone

OFFLINE = """
import socket, sys
def refuse(*_): raise AssertionError("a connection was opened")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from foveal.cli.main import main
sys.exit(main())
"""


def test_the_method_is_full_unless_said(photos: Path, cache: Path, tmp_path: Path):
    made = foveal.fit(photos, backbone="test_efficientnet", scratch=True, budget="1s", out=tmp_path / "b", offline=True)
    assert made.manifest["method"]["name"] == "full"
    assert made.manifest["request"]["method"] == "full"


def test_the_seed_draws_the_weights(cache: Path, tiny: str, tmp_path: Path):
    one, again, other = (random_backbone("test_vit", seed).fingerprint() for seed in (0, 0, 1))
    assert one == again != other
    named = random_backbone(tiny, 0)
    assert named.origin == "random"
    assert named.fingerprint() == random_backbone("test_efficientnet", 0).fingerprint()
    assert named.fingerprint() != load_backbone(tiny).fingerprint()


@pytest.mark.parametrize("method", ["linear", "gda-clip", "lora", "vpt", "attention-only"])
def test_what_keeps_the_backbone_frozen_is_refused_before_data_are_read(method: str, tmp_path: Path):
    with pytest.raises(UsageError, match=f"--scratch with {method}, which keeps pretrained weights frozen"):
        foveal.fit(tmp_path / "none", backbone="test_vit", scratch=True, method=method, out=tmp_path / "b")


def test_a_frozen_trunk_of_another_task_is_refused_and_a_fixed_position_is_not():
    method = catalogue.create("subpixel-heatmap:freeze=true")
    backbone = random_backbone("test_resnet", 0)
    parameters = learnable(backbone)
    must_learn(method, parameters)
    method.attach(backbone, 3)
    with pytest.raises(UsageError, match="--scratch with subpixel-heatmap"):
        must_learn(method, parameters)
    fixed = random_backbone("test_resnet", 0)
    next(fixed.parameters()).requires_grad_(False)
    must_learn(method, learnable(fixed))


def test_forecasts_start_from_random_weights_anyway(tmp_path: Path):
    with pytest.raises(UsageError, match="--scratch: cab always starts from random weights"):
        foveal.fit(tmp_path / "tracks.parquet", task="forecast", scratch=True, out=tmp_path / "b")


def test_digits_on_an_architecture_with_random_weights(cache: Path, tmp_path: Path):
    out = tmp_path / "digits"
    options = ["--backbone", "test_resnet", "--scratch", "--method", "full:epochs=2,lr=2e-3", "--out", str(out)]
    command = [sys.executable, "-c", OFFLINE, "fit", "sample:digits", *options, "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "bundle.json").read_text("utf-8"))
    assert manifest["backbone"]["origin"] == "random"
    assert manifest["request"]["scratch"] is True
    made = foveal.load(out)
    assert made.cost["parameters"]["trained"] == sum(p.numel() for p in made.model.classifier.parameters())
    for page in ("report.html", "README.md"):
        assert "test_resnet, weights: random" in (out / page).read_text("utf-8").replace("\\_", "_")
    start, end = random_backbone("test_resnet", 3).state_dict(), made.model.classifier.backbone.state_dict()
    assert all(not torch.equal(start[name], end[name]) for name in start if name.endswith("weight"))
    with pytest.raises(UsageError, match=r"another command \(.*scratch True.*\)"):
        foveal.fit("sample:digits", backbone="test_resnet", method="full:epochs=2,lr=2e-3", seed=3, out=out)
    assert made.metrics["balanced_accuracy"]["low"] > 0.2
