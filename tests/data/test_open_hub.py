from __future__ import annotations

import json
import sys

import datasets
import pytest
from PIL import Image

from foveal.core.errors import DataError, MissingExtra
from foveal.data import hub
from foveal.data.open import open_dataset


def rows(count: int, seed: int, picture):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    images = [picture(seed + row) for row in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": [row % 2 for row in range(count)]}, features=features)


@pytest.fixture
def served(monkeypatch, picture):
    """What the Hub would hand out for any name."""
    content = datasets.DatasetDict({"train": rows(4, 0, picture), "validation": rows(2, 10, picture)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: content)
    return content


def test_splits_labels_and_bytes(served, picture):
    dataset = open_dataset("hub:owner/name")
    assert dataset.name == "hub:owner/name"
    assert dataset.ids[0] == "train/0000000"
    assert dataset.classes == ("no", "yes")
    assert dataset.splits.tolist() == ["train"] * 4 + ["val"] * 2
    assert list(dataset.image(5).getdata()) == list(picture(11).getdata())
    assert isinstance(dataset.read(0), bytes)


def test_one_part_is_unsplit(monkeypatch, picture):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows(4, 0, picture)))
    assert open_dataset("hub:owner/name").splits is None


def test_class_names_in_numeric_order_become_sorted_names(monkeypatch, picture):
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["zebra", "ant"])})
    content = datasets.Dataset.from_dict({"img": [picture(0), picture(1)], "fine": [0, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: content)
    dataset = open_dataset("hub:owner/name")
    assert dataset.classes == ("ant", "zebra")
    assert dataset.labels.tolist() == [1, 0]


def test_several_labels(monkeypatch, picture):
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(names)})
    content = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "labels": [[0, 2], []]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: content)
    dataset = open_dataset("hub:owner/name")
    assert dataset.task == "multi-label"
    assert dataset.labels.tolist() == [[1, 1], [0, 0]]


def test_images_named_by_path(monkeypatch, tmp_path, picture):
    monkeypatch.setattr(hub, "cache_folders", lambda: [str(tmp_path)])
    for kind in ("ant", "bee"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        picture(len(kind)).save(tmp_path / "train" / kind / "1.png")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    dataset = hub.from_datasets("local", loaded)
    assert dataset.classes == ("ant", "bee")
    assert isinstance(dataset.image(0), Image.Image)


def test_no_image_column(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataError, match=r"columns text \(Value\): expected an image column and a label column"):
        open_dataset("hub:owner/name")


def test_offline_and_not_in_the_cache():
    with pytest.raises(DataError, match="not in the Hugging Face cache: run once without --offline"):
        open_dataset("hub:nobody/nothing-of-this-name", offline=True)


def test_offline_from_the_cache(monkeypatch, tmp_path, picture):
    """The cache as the library leaves it after owner/name was loaded once."""
    for kind in ("ant", "bee"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        picture(len(kind)).save(tmp_path / "train" / kind / "1.png")
    datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made").rglob("dataset_info.json"))
    kept = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / ("a" * 40)
    kept.mkdir(parents=True)
    made.with_name("imagefolder-train.arrow").rename(kept / "name-train.arrow")
    info = json.loads(made.read_text()) | {"dataset_name": "name", "config_name": "default"}
    (kept / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "cache_folders", lambda: [str(tmp_path)])
    before = datasets.config.HF_HUB_OFFLINE
    dataset = open_dataset("hub:owner/name", offline=True)
    assert dataset.classes == ("ant", "bee")
    assert dataset.image(0).size == (40, 30)
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "/x"])
def test_names_of_another_shape(name):
    with pytest.raises(DataError, match="expected hub:owner/name"):
        open_dataset(f"hub:{name}")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'foveal\[hub\]'"):
        open_dataset("hub:owner/name")
