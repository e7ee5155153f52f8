"""Images and texts on the main path: fit a small table, open the Bundle, answer with words; zero-shot without one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import foveal
from foveal.backbones.adapter import load_backbone
from foveal.backbones.text import sentence_encoder
from foveal.core.errors import BundleError, DataError, UsageError
from foveal.data.captioned import digit_pairs
from foveal.ship.hub import OWN
from foveal.ship.image_text import ImageTextBundle
from foveal.ship.zero_shot import parse_labels, zero_shot


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 canvases of two digits as files, and their captions."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = digit_pairs(40, 8, 12, 0)
    lines = ["image,text,split"]
    assert pairs.images.splits is not None
    for row, (text,) in enumerate(pairs.texts):
        (folder / pairs.images.ids[row]).write_bytes(pairs.images.read(row))
        lines.append(f"{pairs.images.ids[row]},{text},{pairs.images.splits[row]}")
    (folder / "pairs.csv").write_text("\n".join(lines), "utf-8")
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(dict(load_backbone("test_efficientnet", pretrained=False).model.state_dict()), file)
    return f"test_efficientnet@{file}"


def fit(table: Path, backbone: str, out: Path, method: str) -> ImageTextBundle:
    made = foveal.fit(str(table), method=method, backbone=backbone, out=out, device="cpu", offline=True)
    assert isinstance(made, ImageTextBundle)
    return made


SCRATCH = "clip:text=scratch,dim=16,epochs=1,batch_size=20,pretrained=1"


@pytest.fixture(scope="module")
def bundle(table: Path, backbone: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageTextBundle:
    return fit(table, backbone, tmp_path_factory.mktemp("runs") / "digits", SCRATCH)


def test_a_bundle_holds_what_was_measured(bundle: ImageTextBundle):
    files = {file.name for file in bundle.path.iterdir()}
    assert files == {"bundle.json", "model.safetensors", "metrics.json", "cost.json", "report.html", "README.md"}
    assert bundle.manifest["task"] == "image-text"
    assert bundle.metrics["n"] == bundle.metrics["image_to_text"]["n"] == 12
    assert 0 <= bundle.metrics["image_to_text"]["r_at_1"]["value"] <= 1
    assert len(bundle.metrics["history"]) == 1
    assert bundle.cost["parameters"]["trained"] == sum(p.numel() for p in bundle.model.parameters())
    page = (bundle.path / "report.html").read_text("utf-8")
    assert "Texts for an image" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "zero-shot-image-classification" in (bundle.path / "README.md").read_text("utf-8")
    assert "texts for images: R@1" in bundle.to_text()
    assert not bundle.path.with_name("digits.work").exists()


def test_the_same_command_is_done_and_another_is_refused(bundle: ImageTextBundle, table: Path, backbone: str):
    assert fit(table, backbone, bundle.path, SCRATCH).manifest == bundle.manifest
    with pytest.raises(UsageError, match="holds the Bundle of another command"):
        fit(table, backbone, bundle.path, SCRATCH + ",lr=0.1")


def test_loaded_it_says_what_its_vectors_say(bundle: ImageTextBundle, table: Path):
    opened = foveal.load(bundle.path)
    photos = sorted(table.parent.glob("test-*.png"))[:3]
    labels = ["three then seven", "one then two", "nine then nine"]
    rows = opened.with_labels(labels, templates=("{}",)).predict(photos, device="cpu")
    cosines = opened.embed_images(photos) @ opened.embed_texts(labels).T
    expected = (opened.model.scale * cosines).softmax(1)
    for row, own in zip(rows, expected, strict=True):
        assert row["label"] == labels[int(own.argmax())]
        assert row["probability"] == pytest.approx(float(own.max()), abs=1e-3)
        assert row["unknown"] is None
    by_verb = foveal.predict(bundle.path, photos, labels=",".join(labels), device="cpu")
    assert [row["label"] in labels for row in by_verb.to_dict()] == [True] * 3
    assert "then" in by_verb.to_text()


def test_its_labels_travel_in_one_onnx_file(bundle: ImageTextBundle, table: Path, tmp_path: Path):
    import onnx

    answers = bundle.with_labels("three then seven,one then two")
    photos = [Image.open(file).convert("RGB").resize((70, 50)) for file in sorted(table.parent.glob("test-*.png"))[:3]]
    record = answers.export(tmp_path / "labels.onnx", photos)
    assert record["max_abs_difference"] < 1e-4
    told = {each.key: each.value for each in onnx.load(tmp_path / "labels.onnx").metadata_props}
    assert json.loads(told["classes"]) == ["three then seven", "one then two"]


def test_both_towers_as_onnx_are_the_bundle(bundle: ImageTextBundle, table: Path, tmp_path: Path):
    import shutil

    import onnxruntime

    shutil.copytree(bundle.path, tmp_path / "copy")
    record = foveal.export(tmp_path / "copy").to_dict()
    assert record["max_abs_difference"] < 1e-4
    assert (record["images"], record["checked"]) == (8, "images and 4 texts")
    assert foveal.load(tmp_path / "copy").cost["onnx"]["text_bytes"] == (tmp_path / "copy" / "text.onnx").stat().st_size
    seen, heard = (
        onnxruntime.InferenceSession(tmp_path / "copy" / name, providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "text.onnx")
    )
    assert heard.get_modelmeta().custom_metadata_map["tokenizer"] == "bytes"
    photos = [Image.open(file).convert("RGB").resize((70, 50)) for file in sorted(table.parent.glob("test-*.png"))[:3]]
    vectors = seen.run(["vectors"], {"image": np.stack([np.asarray(photo) for photo in photos])})[0]
    assert np.allclose(np.asarray(vectors), bundle.embed_images(photos).numpy(), atol=1e-4)
    texts = ["one then two", "a", "nine then nine, and more of them"]
    ids, mask = bundle.model.text.tokens(texts)
    words = heard.run(["vectors"], {"ids": ids.numpy(), "mask": mask.numpy()})[0]
    assert np.allclose(np.asarray(words), bundle.embed_texts(texts).numpy(), atol=1e-4)
    alone = bundle.embed_texts(["a"]).numpy()[0]
    assert np.allclose(np.asarray(words)[1], alone, atol=1e-4), "what stands under the padding changed the vector"


def test_what_export_refuses(bundle: ImageTextBundle, tmp_path: Path):
    with pytest.raises(UsageError, match="--int8 is for classifiers of images alone"):
        foveal.export(bundle.path, int8=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no images given.*name others with --images"):
        foveal.export(bundle.path, images=tmp_path / "empty")
    assert not (bundle.path / "model.onnx").exists()
    assert not (bundle.path / "text.onnx").exists()


def test_without_labels_it_cannot_answer(bundle: ImageTextBundle, table: Path):
    with pytest.raises(UsageError, match="knows no classes of its own: say them"):
        foveal.predict(bundle.path, [table.parent])
    with pytest.raises(UsageError, match="knows no classes of its own: say them"):
        foveal.predict(Path("zero-shot"), [table.parent])


def test_an_edited_bundle_is_refused(bundle: ImageTextBundle, tmp_path: Path):
    import shutil

    shutil.copytree(bundle.path, tmp_path / "edited")
    manifest = json.loads((bundle.path / "bundle.json").read_text("utf-8"))
    manifest["text"]["shape"]["layers"] = 400
    (tmp_path / "edited" / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=r"the language tower holds .* numbers, its weights only"):
        _ = foveal.load(tmp_path / "edited").model
    manifest["text"]["kind"] = "other"
    (tmp_path / "edited" / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match="not as foveal writes it"):
        foveal.load(tmp_path / "edited")


def test_the_sentence_tower_travels_with_its_tokenizer(table: Path, backbone: str, cache: Path, tmp_path: Path):
    made = fit(table, backbone, tmp_path / "sentence", "clip:dim=8,epochs=1,batch_size=20,pretrained=0")
    assert (made.path / "tokenizer.json").exists()
    assert made.cost["parameters"]["trained"] == 8 * (384 + made.model.image.width) + 1
    assert foveal.export(made.path)["max_abs_difference"] < 1e-4
    assert {file.name for file in made.path.iterdir()} <= set(OWN), "foveal push would leave some of it behind"
    vectors = foveal.load(made.path).embed_texts(["a cat", "a dog"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)
    tokenizer = made.path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8") + " ", "utf-8")
    with pytest.raises(BundleError, match=r"tokenizer.json in Bundle .* was edited"):
        foveal.load(made.path).embed_texts(["a cat"])


def test_a_text_too_long_for_the_tower_is_named(table: Path, backbone: str, tmp_path: Path):
    lines = table.read_text("utf-8").splitlines()
    for name in lines[1:]:
        image = name.split(",")[0]
        (tmp_path / image).write_bytes((table.parent / image).read_bytes())
    lines[1] = lines[1].replace(" then ", " then " * 60)
    (tmp_path / "pairs.csv").write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match="at most 256 fit: shorten it"):
        fit(tmp_path / "pairs.csv", backbone, tmp_path / "out", SCRATCH)
    assert not (tmp_path / "out").exists()


def test_a_method_of_another_task(table: Path):
    with pytest.raises(UsageError, match="--task image-text --method linear: linear does"):
        foveal.fit(str(table), method="linear", task="image-text")


def test_labels():
    assert parse_labels(" a cat, a dog") == ("a cat", "a dog")
    for wrong, said in (("a cat", "only 'a cat'"), ("a,,b", "one is empty"), ("a,b,a", "'a' comes twice")):
        with pytest.raises(UsageError, match=said):
            parse_labels(wrong)


def test_names_alone_tell_photos_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Rows of the real sentence encoder and network, from a map of 60 classes instead of 1,000 to save time."""
    from foveal.backbones import class_rows

    names, meanings = class_rows.imagenet_names()
    kept = [*range(281, 286), *range(0, 1000, 20)]
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    weight = class_rows.imagenet_classifier(offline=True).head.weight
    assert isinstance(weight, torch.Tensor)
    rows = F.normalize(weight.detach()[kept])
    texts = class_rows.known_texts(sentence_encoder(), [names[k] for k in kept], [meanings[k] for k in kept])
    ridge = class_rows.fit_ridge(texts, rows)
    monkeypatch.setattr(class_rows, "imagenet_ridge", lambda *_, **__: (ridge, 1.5))
    from foveal.data.photos import photos

    shown = photos(("chelsea", "rocket"))
    rows = zero_shot("a cat,a motorcycle").predict([shown["chelsea"], np.zeros((40, 50, 3), np.uint8)])
    assert rows[0]["label"] == "a cat"
    assert rows[0]["probability"] > 0.9
    assert rows[1]["unknown"] is None
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    Image.new("RGB", (30, 30)).save(tmp_path / "good.png")
    answers = zero_shot("a cat,a dog").predict([bad, tmp_path / "good.png"])
    assert answers[0]["label"] is None
    assert "error" in answers[0]
    with pytest.raises(DataError, match="none of the 1 images can be decoded"):
        zero_shot("a cat,a dog").predict(bad)
