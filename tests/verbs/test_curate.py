"""`foveal curate`: the manifest, what reads it, groups, splits, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import foveal
from foveal.core.errors import DataError, UsageError
from foveal.data.open import open_dataset, open_pool
from foveal.data.pieces import in_pieces

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders; of each of four pictures five copies with a grain of noise: 0_0.png to 3_4.png."""
    root = tmp_path_factory.mktemp("copies")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir()
        for picture in range(4):
            coarse = np.random.default_rng([picture, label == "cat"]).integers(0, 255, (6, 6, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((60, 60), Image.Resampling.BICUBIC)).astype(float)
            for copy in range(5):
                noisy = (smooth + rng.normal(0, 1, smooth.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / label / f"{picture}_{copy}.png")
    return root


def test_a_manifest_is_data(copies: Path, tmp_path: Path):
    found = foveal.curate(str(copies), out=tmp_path / "subset.parquet").to_dict()
    assert (found["images"], found["kept"], found["chosen"]) == (40, 8, {"radius": 6})
    dataset = open_dataset(tmp_path / "subset.parquet")
    assert [name.rpartition("/")[2] for name in dataset.ids] == ["0_0.png", "1_0.png", "2_0.png", "3_0.png"] * 2
    assert dataset.classes == ("cat", "dog")
    assert dataset.image(0).size == (60, 60)
    assert in_pieces(str(tmp_path / "subset.parquet"), 100).images == 8
    rows = pq.read_table(tmp_path / "subset.parquet").to_pylist()
    dropped = next(row for row in rows if row["image"].endswith("cat/2_3.png"))
    assert dropped["cluster"] == "cat/2_0.png"
    assert not dropped["kept"]
    assert dropped["reason"].startswith("dropped: ")
    assert {row["reason"] for row in rows if row["kept"]} == {"kept: stands for 4 more"}
    page = (tmp_path / "subset.html").read_text()
    assert "8 of 40 images kept" in page
    assert page.count("data:image/jpeg") == 8 * 5 + 0
    assert json.loads(json.dumps(found)) == found


def test_below_the_manifest_paths_are_relative(copies: Path):
    out = copies / "subset.parquet"
    foveal.curate(str(copies), out=out)
    assert pq.read_table(out)["image"][0].as_py() == "cat/0_0.png"
    assert len(open_dataset(out)) == 8
    out.unlink()
    out.with_suffix(".html").unlink()


def test_images_that_are_no_files_travel_along(tmp_path: Path):
    foveal.curate("sample:digits", keep=0.1, out=tmp_path / "few.parquet")
    few, digits = open_dataset(tmp_path / "few.parquet"), open_dataset("sample:digits")
    assert 0 < len(few) <= 179
    row = list(digits.ids).index(few.ids[5])
    assert few.read(5) == digits.read(row)
    assert few.classes[few.labels[5]] == digits.classes[digits.labels[row]]
    assert in_pieces(str(tmp_path / "few.parquet"), 100).images == len(few)


def test_every_verb_sees_only_what_stays(copies: Path, tmp_path: Path):
    foveal.curate(str(copies), method="less-is-more:radius=2", out=tmp_path / "subset.parquet")
    kept = len(open_dataset(tmp_path / "subset.parquet"))
    table = foveal.embed(
        str(tmp_path / "subset.parquet"), out=tmp_path / "table", backbone="test_resnet@" + saved(tmp_path)
    )
    assert table["images"] == kept


def saved(folder: Path) -> str:
    """Weights of timm's smallest ResNet."""
    import torch
    from safetensors.torch import save_file

    from foveal.backbones.adapter import load_backbone

    torch.manual_seed(0)
    save_file(load_backbone("test_resnet", pretrained=False).model.state_dict(), folder / "w.safetensors")
    return str(folder / "w.safetensors")


def test_without_labels(copies: Path, tmp_path: Path):
    found = foveal.curate(str(copies / "cat"), out=tmp_path / "cats.parquet")
    assert (found["images"], found["kept"]) == (20, 4)
    pool = open_pool(tmp_path / "cats.parquet")
    assert (len(pool), pool.classes) == (4, ())
    assert in_pieces(str(tmp_path / "cats.parquet"), 9).images == 4
    with pytest.raises(DataError, match="has no column label"):
        open_dataset(tmp_path / "cats.parquet")
    again = foveal.curate(str(tmp_path / "cats.parquet"), out=tmp_path / "again.parquet")
    assert (again["images"], again["kept"]) == (4, 4)


def test_groups(copies: Path, tmp_path: Path):
    out = tmp_path / "g.parquet"
    one = foveal.curate(str(copies), method="less-is-more:radius=64", out=out)
    assert one["kept"] == 1
    two = foveal.curate(str(copies), method="less-is-more:radius=64", groups="1", out=out)
    assert (two["kept"], two["groups"]) == (2, 2)
    assert foveal.curate(str(copies), method="less-is-more:radius=64", groups="label", out=out)["groups"] == 2
    assert {row["group"] for row in pq.read_table(out).to_pylist()} == {"cat", "dog"}
    table = copies / "table.csv"
    table.write_text("image,label,patient\n" + "".join(f"cat/{p}_{c}.png,x,p{c}\n" for p in range(4) for c in range(5)))
    assert foveal.curate(str(table), method="less-is-more:radius=64", groups="patient", out=out)["kept"] == 5
    with pytest.raises(DataError, match="has no column doctor"):
        foveal.curate(str(table), groups="doctor", out=out)
    table.unlink()
    with pytest.raises(UsageError, match="expected 1 to 1"):
        foveal.curate(str(copies), groups="2", out=out)
    with pytest.raises(UsageError, match="--groups patient: expected a folder level"):
        foveal.curate(str(copies), groups="patient", out=out)


def test_names_that_look_like_slices(copies: Path, tmp_path: Path):
    noted = foveal.curate(str(copies), out=tmp_path / "s.parquet")
    assert any("look like slices or frames of 8 series" in note for note in noted["notes"])
    grouped = foveal.curate(str(copies), groups="1", out=tmp_path / "s.parquet")
    assert grouped["notes"] == []


def test_val_and_test_stay(copies: Path, tmp_path: Path):
    lines = [f"cat/{p}_{c}.png,{'xy'[p % 2]},{'test' if c == 0 else 'train'}\n" for p in range(4) for c in range(5)]
    (copies / "split.csv").write_text("image,label,split\n" + "".join(lines))
    found = foveal.curate(str(copies / "split.csv"), out=tmp_path / "split.parquet")
    (copies / "split.csv").unlink()
    assert (found["images"], found["kept"], found["untouched"]) == (16, 4, 4)
    dataset = open_dataset(tmp_path / "split.parquet")
    assert sorted(dataset.splits) == ["test"] * 4 + ["train"] * 4


def test_by_features_reads_the_backbone(copies: Path, tmp_path: Path):
    found = foveal.curate(
        str(copies), method="less-is-more:by=features,radius=1", backbone="test_resnet@" + saved(tmp_path),
        out=tmp_path / "f.parquet",
    )  # fmt: skip
    assert 1 <= found["kept"] < 40


def test_what_cannot_be_read_is_named(copies: Path, tmp_path: Path):
    (copies / "cat" / "broken.png").write_bytes(b"nothing")
    found = foveal.curate(str(copies), out=tmp_path / "b.parquet")
    (copies / "cat" / "broken.png").unlink()
    assert found["images"] == 40
    assert found["set_aside"][0][0] == "cat/broken.png"


def test_refusals(copies: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="linear is a method to adapt, not to curate"):
        foveal.curate(str(copies), method="linear", out=tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"--keep 1.5: expected a share above 0 and at most 1"):
        foveal.curate(str(copies), keep=1.5, out=tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"expected a name that ends in .parquet"):
        foveal.curate(str(copies), out=tmp_path / "x")
    other = tmp_path / "mine.parquet"
    other.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists and is no selection"):
        foveal.curate(str(copies), out=other)
    assert other.read_bytes() == b"mine"
    (tmp_path / "page.html").touch()
    with pytest.raises(UsageError, match=r"page.html is in the way"):
        foveal.curate(str(copies), out=tmp_path / "page.parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        foveal.curate(str(tmp_path / "none"), out=tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_deep_grey(tmp_path: Path):
    folder = tmp_path / "ct"
    folder.mkdir()
    for index in range(4):
        values = np.random.default_rng(index).integers(0, 4000, (6, 6)).astype(np.int32)
        grown = np.asarray(Image.fromarray(values).resize((60, 60), Image.Resampling.BICUBIC))
        Image.fromarray(grown.clip(0, 4095).astype(np.uint16)).save(folder / f"{index}.png")
    with pytest.raises(UsageError, match="need a window of grey values"):
        foveal.curate(str(folder), out=tmp_path / "ct.parquet")
    found = foveal.curate(str(folder), method="less-is-more:window=0..4095", out=tmp_path / "ct.parquet")
    assert found["kept"] == 4
