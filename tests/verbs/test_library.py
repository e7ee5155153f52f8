"""`foveal index` and `foveal search`: made, added to, resumed, learnt, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import foveal
from foveal.core.errors import BundleError, DataError, UsageError
from foveal.ship.embedder import Embedder

pytestmark = pytest.mark.usefixtures("cache")
LEARN = "udml-ss:clusters=4,width=8,epochs=1,batch_size=8,each=2,turned=2,lr=0.001"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """timm's smallest ResNet with random weights, as ARCH@FILE."""
    import torch

    from foveal.backbones.adapter import load_backbone

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(load_backbone("test_resnet", pretrained=False).model.state_dict(), file)
    return f"test_resnet@{file}"


@pytest.fixture(scope="module")
def library(photos: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("library") / "photos"
    found = foveal.index(str(photos), out=out, backbone=weights).to_dict()
    assert (found["images"], found["added"], found["engine"], found["words"]) == (48, 48, "exact", None)
    assert found["neighbours"]["queries"] == 48
    assert json.loads(json.dumps(found)) == found
    assert not out.with_name("photos.work").exists()
    return out


def test_an_image_finds_itself_first(library: Path, photos: Path):
    found = foveal.search(library, image=photos / "blue" / "03.jpg", k=4).to_dict()
    assert found["engine"] == "exact"
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4]
    first = found["hits"][0]
    assert (first["id"], first["label"], first["source"]) == ("blue/03.jpg", "blue", str(photos))
    assert first["similarity"] == pytest.approx(1, abs=1e-4)
    similar = [hit["similarity"] for hit in found["hits"]]
    assert similar == sorted(similar, reverse=True)


def test_similarities_are_cosines_of_features(library: Path, photos: Path, weights: str):
    from foveal.backbones.adapter import load_backbone
    from foveal.data.open import open_dataset
    from foveal.features.extract import extract

    dataset = open_dataset(photos)
    X = np.asarray(extract(dataset, load_backbone(weights)).X)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    query = list(dataset.ids).index("red/00.jpg")
    expected = np.argsort(-(X @ X[query]), kind="stable")[:5]
    hits = foveal.search(library, image=photos / "red" / "00.jpg", k=5)["hits"]
    assert [hit["id"] for hit in hits] == [dataset.ids[row] for row in expected]


def test_the_page_shows_neighbours(library: Path, photos: Path, weights: str):
    page = (library / "index.html").read_text()
    assert "test_resnet@w.safetensors" in page
    assert str(photos.parent) not in page, "the page says where on this machine things lie"
    assert str(Path(weights.partition("@")[2]).parent) not in page
    assert "A library of 48 images" in page
    assert page.count("data:image/jpeg") == 6 * 6
    assert "MAP@R" in page


def test_again_and_more(photos: Path, weights: str, tmp_path: Path):
    out = tmp_path / "l"
    one = foveal.index(str(photos / "red"), out=out, backbone=weights)
    assert (one["images"], one["neighbours"]) == (16, None)
    again = foveal.index(str(photos / "red"), out=out)
    assert (again["images"], again["added"]) == (16, 0)
    more = foveal.index(str(photos / "blue"), out=out)  # the same names, another source
    assert (more["images"], more["added"]) == (32, 16)
    hits = foveal.search(out, image=photos / "blue" / "00.jpg", k=1)["hits"]
    assert hits[0]["source"] == str(photos / "blue")
    with pytest.raises(UsageError, match="holds vectors of another backbone"):
        foveal.index(str(photos), out=out, backbone="tf_efficientnet_lite0")
    with pytest.raises(UsageError, match="was not made by udml-ss"):
        foveal.index(str(photos), out=out, method=LEARN)


VICTIM = """
import sys, os
import foveal
from foveal.ship.library import Library
from foveal.verbs import _library
_library.PIECE = 16
whole = Library.add
def add(self, source, rows):
    whole(self, source, rows)
    if len(self) >= 32:
        os._exit(9)
Library.add = add
foveal.index(sys.argv[1], out=sys.argv[2], backbone=sys.argv[3])
"""


def test_killed_it_keeps_what_was_added_and_goes_on(photos: Path, weights: str, tmp_path: Path):
    out = tmp_path / "l"
    command = [sys.executable, "-c", VICTIM, str(photos), str(out), weights]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert len(foveal.search(out, image=photos / "red" / "00.jpg", k=99)["hits"]) == 32
    found = foveal.index(str(photos), out=out)
    assert (found["images"], found["added"]) == (48, 16)


def test_from_a_feature_table(photos: Path, weights: str, library: Path, tmp_path: Path):
    foveal.embed(str(photos), out=tmp_path / "table", backbone=weights)
    found = foveal.index(str(tmp_path / "table"), out=tmp_path / "l", backbone=weights)
    assert found["images"] == 48
    image = photos / "green" / "01.jpg"
    ours, theirs = (foveal.search(each, image=image, k=6)["hits"] for each in (tmp_path / "l", library))
    assert [hit["id"] for hit in ours] == [hit["id"] for hit in theirs]
    with pytest.raises(UsageError, match="with other weights than the library's"):
        foveal.index(str(tmp_path / "table"), out=tmp_path / "m", backbone="tf_efficientnet_lite0")


def test_learnt_from_the_images(photos: Path, weights: str, tmp_path: Path):
    out = tmp_path / "l"
    found = foveal.index(str(photos), out=out, backbone=weights, method=LEARN)
    assert (found["width"], found["method"]["name"], found["images"]) == (8, "udml-ss", 48)
    assert len(json.loads((out / "library.json").read_text())["history"]) == 1
    hits = foveal.search(out, image=photos / "red" / "05.jpg", k=1)["hits"]
    assert hits[0]["id"] == "red/05.jpg"
    assert foveal.index(str(photos), out=out, method=LEARN)["added"] == 0
    (out / "embedding.safetensors").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"embedding.safetensors is missing, was edited or is damaged"):
        foveal.search(out, image=photos / "red" / "05.jpg")


def test_what_cannot_be_read_is_set_aside(photos: Path, weights: str, tmp_path: Path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "good.jpg").write_bytes((photos / "red" / "00.jpg").read_bytes())
    (folder / "bad.jpg").write_bytes(b"nothing")
    found = foveal.index(str(folder), out=tmp_path / "l", backbone=weights)
    assert (found["images"], [name for name, _ in found["set_aside"]]) == (1, ["bad.jpg"])
    (folder / "good.jpg").unlink()
    with pytest.raises(DataError, match="none of the images"):
        foveal.index(str(folder), out=tmp_path / "m", backbone=weights)


def test_refusals(library: Path, photos: Path, tmp_path: Path):
    image = photos / "red" / "00.jpg"
    with pytest.raises(UsageError, match="reads images and no text: search with --image, or index with --backbone tf"):
        foveal.search(library, text="a red thing")
    with pytest.raises(UsageError, match="nothing to search for: give --image FILE or --text WORDS"):
        foveal.search(library)
    with pytest.raises(UsageError, match="both --image and --text: give"):
        foveal.search(library, image=image, text="a red thing")
    with pytest.raises(UsageError, match="-k 0: expected 1 or more"):
        foveal.search(library, image=image, k=0)
    with pytest.raises(BundleError, match="is not a library"):
        foveal.search(tmp_path, image=image)
    with pytest.raises(DataError, match=r"gone.jpg cannot be read|gone.jpg"):
        foveal.search(library, image=tmp_path / "gone.jpg")
    with pytest.raises(UsageError, match="linear is a method to adapt, not to retrieve"):
        foveal.index(str(photos), out=tmp_path / "x", method="linear")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match=r"holds thesis.txt and is no library"):
        foveal.index(str(photos), out=tmp_path / "mine")


def test_the_head_and_unit_length():
    import torch

    from foveal.backbones.adapter import load_backbone

    head = torch.nn.Linear(512, 3).requires_grad_(False)
    backbone = load_backbone("test_resnet", pretrained=False)
    X = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    expected = X @ head.weight.numpy().T + head.bias.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(Embedder(backbone, head).vectors(X), expected, atol=1e-5)


def test_k_is_an_option_of_one_dash(library: Path, photos: Path):
    from typer.testing import CliRunner

    from foveal.cli.main import app

    found = CliRunner().invoke(
        app, ["search", str(library), "--image", str(photos / "red" / "00.jpg"), "-k", "2", "--json"]
    )
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["hits"]) == 2
