"""`foveal audit`: a folder that a person can show, and numbers that cannot flatter."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.backbones.pair import state_hash
from foveal.cli.main import main
from foveal.core.errors import DataError, UsageError

LIGHT = "advencoder:epochs=2,candidates=4,width=2,batch_size=4,eps=0.2"


@pytest.fixture(scope="module")
def bundle(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> foveal.Bundle:
    place = tmp_path_factory.mktemp("audits")
    torch.manual_seed(0)
    net = load_backbone("test_efficientnet", pretrained=False)
    save_file({name: tensor.contiguous() for name, tensor in net.model.state_dict().items()}, place / "net.safetensors")
    backbone = f"test_efficientnet@{place / 'net.safetensors'}"
    return foveal.fit(str(photos), method="linear", backbone=backbone, out=place / "photos", offline=True)


@pytest.fixture(scope="module")
def made(bundle: foveal.Bundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audited") / "audit"
    foveal.audit(bundle.path, str(photos), method=LIGHT, images=12, out=out)
    return out


def test_the_folder_holds_page_numbers_change_and_pictures(bundle: foveal.Bundle, made: Path):
    told = json.loads((made / "audit.json").read_text(encoding="utf-8"))
    found = told["found"]
    assert 2 <= found["n"] <= 12
    assert "held out when the Bundle was fitted" in told["measured"]
    assert "without labels" in told["learnt"]
    assert told["bundle_fingerprint"] == bundle.fingerprint
    assert len(found["sizes"]) == 5
    for row in found["sizes"]:
        assert row["noise"]["linf"] == pytest.approx(row["attack"]["linf"], rel=1e-5)
        assert row["noise"]["rms"] >= row["attack"]["rms"] - 1e-7
        assert row["shuffled"]["rms"] == pytest.approx(row["attack"]["rms"], rel=1e-4)
        for kind in ("attack", "noise", "shuffled"):
            assert 0 <= row[kind]["silent"] <= row[kind]["fooled"] <= 1
            assert {"accuracy", "unknown"} <= row[kind].keys()
    assert found["sizes"][-1]["attack"]["linf"] <= 0.2 + 1e-6
    assert set(found["corruptions"]) == {"darker", "noisy", "blurred", "compressed", "small"}
    change = load_file(made / "perturbation.safetensors")
    assert float(change["delta"].abs().max()) <= 0.2 + 1e-6
    page = (made / "index.html").read_text(encoding="utf-8")
    assert told["verdict"] in page
    assert "random signs of its size" in page
    assert 'src="http' not in page
    for example in told["examples"]:
        clean, attacked = (np.asarray(Image.open(made / name), int) for name in example["files"])
        assert 0 < np.abs(clean - attacked).max() <= 52
        assert example["name"] in page
    assert not made.with_name("audit.work").exists()


def test_the_bundle_is_as_it_was_and_the_same_seed_gives_the_same(
    bundle: foveal.Bundle, photos: Path, made: Path, tmp_path: Path
):
    before = state_hash(foveal.load(bundle.path).model)
    again = foveal.audit(bundle.path, str(photos), method=LIGHT, images=12, out=tmp_path / "again")
    told = json.loads((made / "audit.json").read_text(encoding="utf-8"))
    assert again["found"] == told["found"]
    assert state_hash(foveal.load(bundle.path).model) == before


def test_other_images_are_halved_and_a_patch_has_one_size(bundle: foveal.Bundle, photos: Path, tmp_path: Path):
    for name in ("red", "blue"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / name).symlink_to(photos / name)
    result = foveal.audit(
        bundle.path, str(tmp_path / "own"), method=f"{LIGHT},kind=patch", images=8, out=tmp_path / "out"
    )
    assert "one half of own" in result["measured"]
    assert [row["eps"] for row in result["found"]["sizes"]] == [1.0]
    assert "a patch: answers altered by attack" in result.to_text()


def test_what_is_refused(
    bundle: foveal.Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    expected = "linear is a method of family adapt: expected one that attacks or examines, advencoder or filter-design"
    with pytest.raises(UsageError, match=expected):
        foveal.audit(bundle.path, str(photos), method="linear", out=tmp_path / "x")
    with pytest.raises(UsageError, match="--images 1: expected at least 2"):
        foveal.audit(bundle.path, str(photos), images=1, out=tmp_path / "x")
    with pytest.raises(UsageError, match="exists and holds no audit"):
        foveal.audit(bundle.path, str(photos), out=photos)
    for name in ("purple", "red"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "0.jpg").write_bytes((photos / "red" / "00.jpg").read_bytes())
    with pytest.raises(DataError, match=r"classes the Bundle does not know \(purple\)"):
        foveal.audit(bundle.path, str(tmp_path / "other"), out=tmp_path / "x")
    command = ["foveal", "audit", str(bundle.path), str(photos), "--method", "advencoder:eps=10", "--out"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "eps=10: images are in [0, 1] here, give 10/255 = 0.0392" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_examination_needs_no_labels_and_writes_page_numbers_weights_and_pictures(
    bundle: foveal.Bundle, photos: Path, tmp_path: Path
):
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for number, file in enumerate(sorted(photos.glob("*/*.jpg"))[:10]):
        (unlabelled / f"{number}.jpg").write_bytes(file.read_bytes())
    before = state_hash(foveal.load(bundle.path).model)
    choice = "filter-design:bank=pca,filters=6,patches=2000"
    result = foveal.audit(bundle.path, str(unlabelled), method=choice, images=8, out=tmp_path / "out")
    assert state_hash(foveal.load(bundle.path).model) == before
    told = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert told["examined"] == "8 images of unlabelled, without labels"
    assert told["options"]["bank"] == "pca"
    net = foveal.load(bundle.path).model.classifier.backbone.model
    convs = {name: each for name, each in net.named_modules() if isinstance(each, torch.nn.Conv2d)}
    assert {layer["name"] for layer in told["found"]["layers"]} == set(convs)
    assert told["found"]["weights"] == sum(each.weight.numel() for each in convs.values())
    assert load_file(tmp_path / "out" / "tensors.safetensors")["weight"].shape == (6, 3, 3, 3)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(told["pictures"]) >= 2
    assert 'src="http' not in page
    for words in (told["verdict"], "The first layer", "pca on patches of 3 x 3, 6 filters", "conv_stem"):
        assert words in page
    for name in told["pictures"]:
        assert np.asarray(Image.open(tmp_path / "out" / name)).shape[2] == 3
    assert result.to_text().endswith("index.html")
    assert told["verdict"] in result.to_text()
    again = foveal.audit(bundle.path, str(unlabelled), method=choice, images=8, out=tmp_path / "out")
    assert again["found"] == told["found"]


def test_an_examination_leaves_out_what_was_held_out_and_refuses_constant_images(
    bundle: foveal.Bundle, photos: Path, tmp_path: Path
):
    method = "filter-design:bank=random"
    result = foveal.audit(bundle.path, str(photos), method=method, images=200, out=tmp_path / "out")
    number, about = result["examined"].split(" ", 1)
    assert about == "images of photos that were not held out, without labels"
    assert int(number) < 48
    (tmp_path / "grey").mkdir()
    for index in range(3):
        Image.new("RGB", (90, 90), (9 * index, 0, 0)).save(tmp_path / "grey" / f"{index}.png")
    with pytest.raises(DataError, match="all 3 images are constant: zero variance"):
        foveal.audit(bundle.path, str(tmp_path / "grey"), method=method, out=tmp_path / "x")
    with pytest.raises(UsageError, match="--images 0: expected at least 1"):
        foveal.audit(bundle.path, str(photos), method=method, images=0, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
