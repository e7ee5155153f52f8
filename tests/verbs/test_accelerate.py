"""`foveal shrink --method expedit`: a ViT that answers with fewer tokens, measured, and a Bundle like any other."""

from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import foveal
from foveal.core.errors import BackboneError, UsageError
from foveal.evaluate.charts import frontier_chart
from foveal.ship import beside
from foveal.verbs import _shrunk


@pytest.fixture(scope="module")
def vit(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), file)
    out = tmp_path_factory.mktemp("runs") / "vit"
    return foveal.fit(photos, method="linear", backbone=f"test_vit@{file}", out=out, offline=True).path


@pytest.fixture(scope="module")
def faster(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "faster"
    made = foveal.shrink(vit, method="expedit:after=1", target="macs=0.8", out=out, max_drop=1.0, offline=True)
    assert made["sides"]["after"]["macs"] <= 0.8 * made["sides"]["before"]["macs"]
    return out


def test_the_frontier_is_measured_and_plotted(faster: Path):
    rows = foveal.load(faster).cost["shrunk"]["frontier"]
    assert [row["name"] for row in rows] == ["dense", "9 x 9", "7 x 7", "5 x 5", "3 x 3"]
    shares = [row["macs"] for row in rows]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert all(row["milliseconds"] > 0 and 0 <= row["balanced_accuracy"] <= 1 for row in rows)
    page = (faster / "report.html").read_text(encoding="utf-8")
    assert "At other budgets" in page
    assert str(frontier_chart(rows)) in page


def test_it_is_a_bundle_like_any_other(faster: Path, vit: Path, photos: Path):
    bundle = foveal.load(faster)
    (step,) = bundle.manifest["steps"]
    assert step["name"] == "expedit"
    assert step["plan"]["start"] == 1
    assert step["plan"]["tokens"] == [10, 10]
    assert bundle.manifest["parent"] == foveal.load(vit).fingerprint
    assert bundle.model.classifier.backbone.token_hook is not None
    image = photos / "red" / "00.jpg"
    (row,) = bundle.predict([image])
    foveal.export(faster)
    with Image.open(image) as opened:
        session = onnxruntime.InferenceSession(faster / "model.onnx")
        probabilities, _ = session.run(None, {session.get_inputs()[0].name: np.asarray(opened)[None]})
    answered = dict(zip(bundle.classes, map(float, probabilities[0]), strict=True))
    assert answered[row["label"]] == pytest.approx(row["probability"], abs=1e-4)
    explained = foveal.explain(faster, [image], method="eigen-cam", out=faster.with_name("maps"), score=False)
    assert explained["images"][0]["map"] == "00.png"


def test_refusals(vit: Path, faster: Path, colours: foveal.Bundle, tmp_path: Path):
    with pytest.raises(BackboneError, match="use a plain ViT such as vit, which comes with foveal"):
        foveal.shrink(colours.path, method="expedit", out=tmp_path / "x", offline=True)
    with pytest.raises(BackboneError, match="already changed on their way: expedit comes first"):
        foveal.shrink(faster, method="expedit", out=tmp_path / "x", offline=True)
    with pytest.raises(UsageError, match="after=99: the model has 6 blocks"):
        foveal.shrink(vit, method="expedit:after=99", out=tmp_path / "x", offline=True)
    with pytest.raises(UsageError, match="tau=0: input should be greater than 0"):
        foveal.shrink(vit, method="expedit:tau=0", out=tmp_path / "x", offline=True)
    assert not (tmp_path / "x").exists()


def test_parallel_blocks_are_tuned_on_the_bundles_own_images(vit: Path, photos: Path, tmp_path: Path):
    made = foveal.shrink(vit, method="three-things-vit:steps=3", out=tmp_path / "par", max_drop=1.0, offline=True)
    before, after = made["sides"]["before"], made["sides"]["after"]
    assert before["macs"] == after["macs"]
    assert after["parameters"] < before["parameters"]
    assert made["steps"][0]["notes"] == {"blocks": "6 x 1 -> 3 x 2", "merged": True, "tuned": 3}
    bundle = foveal.load(tmp_path / "par")
    assert bundle.cost["shrunk"]["frontier"] == []
    assert "At other budgets" not in (tmp_path / "par" / "report.html").read_text(encoding="utf-8")
    assert len(bundle.model.classifier.backbone.blocks) == 3
    (row,) = bundle.predict([photos / "red" / "00.jpg"])
    assert 0 < row["probability"] <= 1


@pytest.mark.parametrize("chain", [["powerquant:bits=6", "expedit:after=1"], ["expedit:after=1", "powerquant:bits=6"]])
def test_few_tokens_and_few_bits_in_either_order(
    chain: list[str], vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_shrunk, "timed_beside", partial(beside.timed_beside, seconds=0.02))
    made = foveal.shrink(
        vit, method="+".join(chain), target="macs=0.8", out=tmp_path / "both", max_drop=1.0, offline=True
    )
    before, after = made["sides"]["before"], made["sides"]["after"]
    assert after["macs"] <= 0.8 * before["macs"]
    assert after["bytes"] < 0.5 * before["bytes"]
    bundle = foveal.load(tmp_path / "both")
    assert [step["name"] for step in bundle.manifest["steps"]] == [each.partition(":")[0] for each in chain]
    assert bundle.model.classifier.backbone.token_hook is not None
    assert bundle.codes
    assert foveal.export(tmp_path / "both", images=photos / "red")["max_abs_difference"] < 1e-4
