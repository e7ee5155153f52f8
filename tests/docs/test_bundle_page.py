"""docs/bundle.md names every field of a real Bundle, and no field that is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import foveal
from foveal.core.bundle import FORMAT
from foveal.core.errors import BundleError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
FILES = ("bundle.json", "calibration.json", "metrics.json", "cost.json")


@pytest.fixture(scope="module")
def bundles(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[foveal.Bundle]:
    """One label per image, exported; and several labels per image."""
    folder = tmp_path_factory.mktemp("bundles")
    rows = [f"{path},{path.parent.name}|{'odd' if int(path.stem) % 2 else 'even'}" for path in photos.glob("*/*.jpg")]
    (folder / "table.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    made = [
        foveal.fit(str(photos), out=folder / "one", offline=True),
        foveal.fit(str(folder / "table.csv"), method="linear", out=folder / "several", offline=True),
    ]
    foveal.export(made[0].path)
    return made


def documented(file: str) -> dict[str, bool]:
    """Field -> whether it may lack."""
    section = PAGE.split(f"### {file}\n", 1)[1].split("\n### ", 1)[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
    return {field: "may lack" in text for field, text in rows}


def fields(content: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield prefix
    if isinstance(content, dict):
        for key, value in content.items():
            yield from fields(value, (*prefix, key))


def covers(field: str, path: tuple[str, ...]) -> bool:
    """Whether `path` is the field, or lies below it."""
    parts = field.split(".")
    return len(path) >= len(parts) and all(part in ("*", name) for part, name in zip(parts, path, strict=False))


@pytest.mark.parametrize("file", FILES)
def test_every_field_is_documented_and_there(file: str, bundles: list[foveal.Bundle]):
    known = documented(file)
    assert len(known) > 5
    for bundle in bundles:
        content = json.loads((bundle.path / file).read_text(encoding="utf-8"))
        paths = list(fields(content))
        for path in paths:
            shortened = (field.split(".")[: len(path)] for field in known)  # an object on the way to a field
            assert not path or any(covers(".".join(parts), path) for parts in shortened), f"{file}: {path}"
        for field, optional in known.items():
            assert optional or any(covers(field, path) for path in paths), f"{file}: no {field}"


def test_unknown_fields_are_ignored_and_newer_formats_refused(bundles: list[foveal.Bundle], tmp_path: Path):
    assert f'`"format": {FORMAT}`' in PAGE
    folder = tmp_path / "copy"
    shutil.copytree(bundles[0].path, folder)
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**manifest, "added_later": {"x": 1}}), encoding="utf-8")
    assert foveal.load(folder).classes == bundles[0].classes
    (folder / "bundle.json").write_text(json.dumps({**manifest, "format": FORMAT + 1}), encoding="utf-8")
    with pytest.raises(BundleError, match=f"format {FORMAT + 1}, this foveal reads up to {FORMAT}"):
        foveal.load(folder)


def test_hashes_are_of_the_files_that_must_not_change(bundles: list[foveal.Bundle]):
    assert set(bundles[0].manifest["sha256"]) == {"model.safetensors", "calibration.json", "metrics.json"}
