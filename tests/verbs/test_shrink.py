"""`foveal shrink`: a Bundle out that every other verb takes, and an honest before and after."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.cli.main import main
from foveal.core.errors import BundleError, UsageError
from foveal.ship import beside
from foveal.verbs import _shrunk
from foveal.verbs._shrunk import choose_chain, parse_target

QUICK = "singe:images=4,steps=1,between=0,after=2+powerquant:bits=4,exponent=0.5"


@pytest.fixture(scope="module")
def bundle(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrink")
    backbone = load_backbone("test_efficientnet", pretrained=False)
    save_file(backbone.model.state_dict(), folder / "weights.safetensors")
    weights = f"test_efficientnet@{folder / 'weights.safetensors'}"
    return foveal.fit(photos, method="linear", backbone=weights, out=folder / "photos", offline=True).path


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("shrunk") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_shrunk, "timed_beside", partial(beside.timed_beside, seconds=0.05))
        return foveal.shrink(bundle, method=QUICK, target="macs=0.6", max_drop=1.0, out=out).to_dict()


def test_before_and_after_stand_side_by_side(bundle: Path, made: dict[str, Any]):
    before, after, int8 = (made["sides"][name] for name in ("before", "after", "after, int8"))
    assert after["macs"] <= 0.6 * before["macs"]
    assert after["parameters"] < before["parameters"]
    assert after["bytes"] == (Path(made["bundle"]) / "model.safetensors").stat().st_size < before["bytes"]
    assert [row["batch"] for row in after["latency"]] == [row["batch"] for row in int8["latency"]] == [1, 8]
    assert made["drop"] == before["balanced_accuracy"] - after["balanced_accuracy"]
    assert made["accepted"]
    assert made["target"] == {"quantity": "macs", "share": 0.6}
    page = (Path(made["bundle"]) / "report.html").read_text(encoding="utf-8")
    assert "Before and after" in page
    assert made["verdict"].split(";")[0].removeprefix("accepted") in page
    manifest = foveal.load(made["bundle"]).manifest
    assert [step["name"] for step in manifest["steps"]] == ["singe", "powerquant"]
    assert manifest["parent"] == foveal.load(bundle).fingerprint
    assert "changed the structure of timm" in (Path(made["bundle"]) / "README.md").read_text(encoding="utf-8")


def test_every_other_verb_takes_it(photos: Path, made: dict[str, Any], tmp_path: Path):
    folder, image = Path(made["bundle"]), photos / "red" / "00.jpg"
    row = foveal.load(folder).predict(image)[0]
    assert row["label"] in ("blue", "green", "red")
    measured = foveal.evaluate(folder, str(photos))
    assert measured["n"] == 48
    maps = foveal.explain(folder, [image], method="eigen-cam", out=tmp_path / "maps", score=False)
    assert maps["images"][0]["label"] == row["label"]
    assert foveal.export(folder)["max_abs_difference"] < 1e-4


def test_the_same_command_again_and_another(bundle: Path, made: dict[str, Any]):
    out = Path(made["bundle"])
    stamp = (out / "bundle.json").stat().st_mtime_ns
    again = foveal.shrink(bundle, method=QUICK, target="macs=0.6", max_drop=1.0, out=out).to_dict()
    assert again == made
    assert (out / "bundle.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="holds the Bundle of another command"):
        foveal.shrink(bundle, method="powerquant", out=out)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda steps: steps[0].update(name="linear", options={}), "names linear as a step"),
        (lambda steps: steps[0]["plan"]["sizes"].update(nowhere={"out": 1}), "the plan resizes nowhere"),
        (lambda steps: steps[0]["plan"].pop("sizes"), "sizes"),
        (lambda steps: steps[1]["plan"]["bits"].update(head=9), "codes head with 9 bits"),
        (lambda steps: steps.clear(), "do not fit"),
        (lambda steps: steps.extend(20 * steps), "steps: List should have at most 16 items"),
        (lambda steps: steps[0].update(plan=[]), "plan: Input should be a valid dictionary"),
    ],
)
def test_steps_of_a_stranger(made: dict[str, Any], tmp_path: Path, change: Any, reason: str):
    shutil.copytree(made["bundle"], tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "bundle.json").read_text())
    change(manifest["steps"])
    (tmp_path / "copy" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=reason):
        foveal.load(tmp_path / "copy").model  # noqa: B018


def test_chains_and_targets():
    chain = choose_chain("singe:rate=0.5,lr=1e-3+powerquant:bits=4")
    assert [each.name for each in chain] == ["singe", "powerquant"]
    assert (chain[0].options.lr, chain[1].options.bits) == (1e-3, 4)
    macs, size = parse_target("macs=0.5", chain), parse_target("size=0.1", chain)
    assert macs
    assert size
    assert (macs.place, size.place) == (0, 1)
    for text, message in (
        ("macs", "expected params=, macs=, latency=, size= and a share between 0 and 1"),
        ("speed=0.5", "expected params="),
        ("macs=1.5", "a share between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_target(text, chain)
    with pytest.raises(UsageError, match=r"no method of the chain can be given that \(powerquant: size\)"):
        parse_target("macs=0.5", choose_chain("powerquant"))
    with pytest.raises(UsageError, match="linear is a method of family adapt: shrink takes"):
        choose_chain("singe+linear")


def test_bad_input_on_the_command_line(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "other" / "purple").mkdir(parents=True)
    (tmp_path / "other" / "grey").mkdir()
    for index in range(8):
        for name in ("purple", "grey"):
            shutil.copy(photos / "red" / f"{index:02d}.jpg", tmp_path / "other" / name)
    for wrong, message in (
        (["--method", "singe:rate=1"], "rate=1"),
        (["--method", "powerquant", "--max-drop", "3"], "--max-drop 3.0: expected a number from 0 to 1"),
        (["--method", "powerquant", "--data", str(tmp_path / "other")], "with classes grey, purple"),
        (["--method", "powerquant", "--target", "size=0.001"], "size=0.001 is out of reach"),
        (["--method", "pwrquant"], "no method 'pwrquant': did you mean powerquant"),
    ):
        monkeypatch.setattr(sys, "argv", ["foveal", "shrink", str(bundle), "--out", str(tmp_path / "x"), *wrong])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert message in captured.err
        assert captured.out == ""
    assert not (tmp_path / "x").exists()
