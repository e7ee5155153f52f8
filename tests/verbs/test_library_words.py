"""`foveal search --text`: libraries of towers that were fitted, of CLIP weights, and of the default backbone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import foveal
from foveal.backbones import class_rows
from foveal.backbones.adapter import load_backbone, normalise
from foveal.cli.main import app
from foveal.core.bundle import sha256
from foveal.core.errors import BundleError, UsageError
from foveal.data.images import to_pixels
from foveal.ship.image_text import ImageTextBundle

pytestmark = pytest.mark.usefixtures("cache")
METHOD = "clip:text=scratch,dim=16,epochs=8,batch_size=18,pretrained=0,lr=0.003,weight_decay=0"


@pytest.fixture(scope="module")
def pairs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos whose colour is what their text says."""
    table = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    rows = [
        f"{photos}/{name}/{index:02d}.jpg,a {name} picture,{'train' if index < 12 else 'val' if index < 14 else 'test'}"
        for name in ("blue", "green", "red")
        for index in range(16)
    ]
    table.write_text("\n".join(["image,text,split", *rows]), "utf-8")
    return table


@pytest.fixture(scope="module")
def bundle(pairs: Path, tiny: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageTextBundle:
    out = tmp_path_factory.mktemp("runs") / "pairs"
    return foveal.fit(str(pairs), method=METHOD, backbone=tiny, out=out, device="cpu", offline=True)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def library(photos: Path, bundle: ImageTextBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("library") / "words"
    found = foveal.index(str(photos), out=out, backbone=str(bundle.path))
    assert (found["images"], found["width"], found["words"]) == (48, 16, "towers")
    assert "searched by image, and by words" in found.to_text()
    assert "by image and by words" in (out / "index.html").read_text("utf-8")
    return out


def test_words_find_what_they_name(library: Path, bundle: ImageTextBundle, photos: Path):
    for name in ("blue", "green", "red"):
        found = foveal.search(library, text=f"a {name} picture", k=48).to_dict()
        assert (found["text"], found["image"]) == (f"a {name} picture", None)
        assert sum(hit["label"] == name for hit in found["hits"][:16]) >= 15
    query, files = bundle.embed_texts(["a red picture"]), [photos / hit["id"] for hit in found["hits"]]
    expected = (bundle.embed_images(files) @ query.T)[:, 0].numpy()
    assert np.allclose([hit["similarity"] for hit in found["hits"]], expected, atol=2e-3)


def test_it_stands_alone_and_is_searched_by_image_too(
    library: Path, bundle: ImageTextBundle, photos: Path, tmp_path: Path
):
    """Where the Bundle is out of the way, and on the command line."""
    aside = bundle.path.rename(bundle.path.with_name("aside"))
    shutil.copytree(library, tmp_path / "elsewhere")
    try:
        asked = ["search", str(tmp_path / "elsewhere"), "--text", "a green picture", "-k", "1", "--json"]
        said = CliRunner().invoke(app, asked)
        assert said.exit_code == 0, said.output
        assert json.loads(said.stdout)["hits"][0]["label"] == "green"
        hits = foveal.search(tmp_path / "elsewhere", image=photos / "green" / "03.jpg", k=1)["hits"]
        assert hits[0]["id"] == "green/03.jpg"
        assert foveal.index(str(photos), out=tmp_path / "elsewhere")["added"] == 0
    finally:
        aside.rename(bundle.path)


def test_towers_of_published_clip_weights(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from foveal.backbones.causal_text import CausalText
    from foveal.backbones.towers import Towers
    from foveal.ship import embedder

    torch.manual_seed(1)
    towers = Towers(load_backbone("test_vit", pretrained=False), CausalText(64, 1), 8, bias=True)
    towers.requires_grad_(False).eval()
    monkeypatch.setattr(embedder, "load_clip", lambda name, offline: towers)
    made = foveal.index(str(photos / "red"), out=tmp_path / "l", backbone="zero-shot:owner/name")
    assert (made["words"], made["width"]) == ("towers", 8)
    monkeypatch.undo()
    ids, mask = towers.text.tokens(["anything"])
    with Image.open(photos / "red" / "02.jpg") as image, torch.no_grad():
        pixels = torch.from_numpy(to_pixels(image, towers.image.preprocessing).copy())[None]
        seen = towers.encode_images(normalise(pixels, towers.image.preprocessing))
        expected = seen @ towers.encode_texts(ids, mask).T
    hits = foveal.search(tmp_path / "l", text="anything", k=16)["hits"]
    (own,) = (hit["similarity"] for hit in hits if hit["id"] == "02.jpg")
    assert own == pytest.approx(float(expected), abs=1e-3)


def test_the_default_backbone_knows_the_words_of_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of the real network, from a map of 60 classes instead of 1,000 to save time."""
    from foveal.backbones.text import sentence_encoder
    from foveal.data.photos import photos as shown

    names, meanings = class_rows.imagenet_names()
    kept = [*range(281, 286), *range(0, 1000, 20)]
    weight = class_rows.imagenet_classifier(offline=True).head.weight
    assert isinstance(weight, torch.Tensor)
    texts = class_rows.known_texts(sentence_encoder(), [names[k] for k in kept], [meanings[k] for k in kept])
    ridge = class_rows.fit_ridge(texts, F.normalize(weight.detach()[kept]))
    monkeypatch.setattr(class_rows, "imagenet_ridge", lambda *_, **__: (ridge, 1.5))
    (tmp_path / "photos").mkdir()
    for name, image in shown(("chelsea", "rocket", "astronaut")).items():
        image.save(tmp_path / "photos" / f"{name}.png")
    found = foveal.index(str(tmp_path / "photos"), out=tmp_path / "l")
    assert found["words"] == "class rows"
    said = CliRunner().invoke(app, ["search", str(tmp_path / "l"), "--text", "a cat", "--json"])
    assert said.exit_code == 0, said.output
    hits = json.loads(said.stdout)["hits"]
    assert hits[0]["id"] == "chelsea.png"
    assert hits[0]["similarity"] > hits[1]["similarity"] + 0.05
    assert foveal.search(tmp_path / "l", image=tmp_path / "photos" / "rocket.png", k=1)["hits"][0]["id"] == "rocket.png"


def test_refusals(library: Path, bundle: ImageTextBundle, photos: Path, colours: foveal.Bundle, tmp_path: Path):
    with pytest.raises(UsageError, match="no words to search for: give some"):
        foveal.search(library, text=" ")
    with pytest.raises(UsageError, match=r"is a Bundle for single-label, whose vectors mean its classes alone: give"):
        foveal.index(str(photos), out=tmp_path / "x", backbone=str(colours.path))
    with pytest.raises(UsageError, match=r"--method udml-ss would move the images of .* away from its words"):
        foveal.index(str(photos), out=tmp_path / "x", backbone=str(bundle.path), method="udml-ss")
    with pytest.raises(UsageError, match="holds vectors of another backbone than"):
        foveal.index(str(photos), out=library, backbone=bundle.manifest["backbone"]["name"])
    assert foveal.index(str(photos), out=library, backbone=str(bundle.path))["added"] == 0
    assert not (tmp_path / "x").exists()

    shutil.copytree(library, tmp_path / "edited")
    weights = tmp_path / "edited" / "embedding.safetensors"
    with safe_open(weights, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about = opened.metadata()
    save_file({name: tensor for name, tensor in tensors.items() if name != "text_proj.weight"}, weights, about)
    with pytest.raises(BundleError, match="was edited or is damaged"):
        foveal.search(tmp_path / "edited", text="a red picture")
    record = json.loads((tmp_path / "edited" / "library.json").read_text("utf-8"))
    (tmp_path / "edited" / "library.json").write_text(json.dumps({**record, "weights": sha256(weights)}), "utf-8")
    with pytest.raises(BundleError, match=r"does not fit library.json .*text_proj"):
        foveal.search(tmp_path / "edited", text="a red picture")
