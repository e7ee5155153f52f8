"""A feature table: what it holds, from every form of data, after a kill, and the same through Ray Data."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.scale.conftest import Start, wait_until

import foveal as api
from foveal.backbones.adapter import load_backbone
from foveal.core.errors import DataError, UsageError
from foveal.data.open import open_dataset
from foveal.features.extract import extract


def read(table: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(table.glob("*.parquet"))])


def features(table: pa.Table) -> np.ndarray:
    return np.stack([np.asarray(row) for row in table["features"].to_numpy(zero_copy_only=False)])


def alike(one: pa.Table, other: pa.Table) -> bool:
    """The same rows; features up to the rounding of batches of another size."""
    known = one.drop_columns("features").equals(other.drop_columns("features"))
    return known and bool(np.abs(features(one) - features(other)).max() < 1e-5)


@pytest.fixture(scope="module")
def table(photos: Path, cache: Path, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "table"
    api.embed(str(photos), backbone=tiny, out=out, shard_rows=20, device="cpu")
    return out


def test_a_table_holds_what_extract_computes(photos: Path, tiny: str, table: Path) -> None:
    dataset, backbone = open_dataset(photos), load_backbone(tiny)
    found = read(table)
    assert found["id"].to_pylist() == list(dataset.ids)
    assert found["label"].to_pylist() == [dataset.classes[label] for label in dataset.labels]
    assert found["split"].null_count == len(dataset)
    assert found["sha256"][7].as_py() == hashlib.sha256(dataset.read(7)).digest()
    assert found.schema.field("features").type == pa.list_(pa.float32(), backbone.width)
    assert np.abs(features(found) - np.asarray(extract(dataset, backbone, device="cpu").X)).max() < 1e-5
    about = json.loads((table / "table.json").read_text())
    assert (about["images"], about["shards"], about["classes"]) == (48, 3, ["blue", "green", "red"])
    assert about["fingerprint"] == backbone.fingerprint()
    assert [pq.read_metadata(path).num_rows for path in sorted(table.glob("*.parquet"))] == [20, 20, 8]


def test_every_form_of_data_gives_the_same_rows(photos: Path, cache: Path, tiny: str, table: Path, tmp_path: Path):
    whole = read(table)
    names, labels = whole["id"].to_pylist(), whole["label"].to_pylist()
    contents = [(photos / name).read_bytes() for name in names]
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for row in range(shard, len(names), 2):
                for suffix, content in (("jpg", contents[row]), ("cls", labels[row].encode())):
                    member = tarfile.TarInfo(f"{row:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    pq.write_table(pa.table({"image": contents, "label": labels}), tmp_path / "inside.parquet", row_group_size=7)
    (tmp_path / "flat").mkdir()
    for row, content in enumerate(contents):
        (tmp_path / "flat" / f"{row:03d}.jpg").write_bytes(content)
    row_of = {sha: row for row, sha in enumerate(whole["sha256"].to_pylist())}
    for data, shards, known in (
        (tmp_path / "shard-{0..1}.tar", 2, True),
        (tmp_path / "inside.parquet", 3, True),
        (tmp_path / "flat", 3, False),
    ):
        out = tmp_path / f"table-{data.stem}"
        totals = api.embed(str(data), backbone=tiny, out=out, shard_rows=20, device="cpu")
        found = read(out)
        assert (totals["images"], totals["shards"]) == (48, shards)
        assert len(set(found["id"].to_pylist())) == 48
        rows = [row_of[sha] for sha in found["sha256"].to_pylist()]
        assert sorted(rows) == list(range(48))
        assert np.abs(features(found) - features(whole)[rows]).max() < 1e-5
        assert found["label"].to_pylist() == [labels[row] if known else None for row in rows]


def test_killed_it_keeps_whole_shards_and_goes_on(
    photos: Path, cache: Path, tiny: str, table: Path, foveal: Start, tmp_path: Path
) -> None:
    asked = ["embed", photos, "--backbone", tiny, "--shard-rows", 2, "--device", "cpu", "--out", tmp_path / "t"]
    process = foveal(*asked)
    wait_until(lambda: len(list((tmp_path / "t").glob("*.parquet"))) >= 3, process)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.parquet")}
    assert all(pq.read_table(path).num_rows == 2 for path in kept)
    (damaged,) = list(kept)[:1]
    damaged.write_bytes(damaged.read_bytes()[:50])
    again = foveal(*asked, "--json")
    told, errors = again.communicate()
    assert again.returncode == 0, errors
    assert json.loads(told)["computed"] == 48 - 2 * (len(kept) - 1)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items() if path != damaged)
    assert alike(read(tmp_path / "t"), read(table))
    assert not [path for path in (tmp_path / "t").iterdir() if path.suffix == ".tmp"]


def test_ray_data_makes_the_same_table(
    photos: Path, cache: Path, tiny: str, table: Path, foveal: Start, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    for name in ("table.json", "part-000001.parquet"):  # as a run without Ray that was stopped left them
        shutil.copy(table / name, tmp_path / "t" / name)
    process = foveal(
        "embed", photos, "--backbone", tiny, "--shard-rows", 20, "--device", "cpu", "--out", tmp_path / "t",
        "--ray", "local", "--json",
    )  # fmt: skip
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(told)["computed"] == 28
    assert read(tmp_path / "t").equals(read(table))


def test_changed_data_are_embedded_again(photos: Path, cache: Path, tiny: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "t"
    shutil.copytree(photos, data)
    api.embed(str(data), backbone=tiny, out=out, shard_rows=20, device="cpu")
    (data / "red" / "15.jpg").unlink()
    (data / "red" / "14.jpg").write_bytes(b"no image")
    totals = api.embed(str(data), backbone=tiny, out=out, shard_rows=20, device="cpu")
    assert (totals["images"], totals["set_aside"], totals["computed"]) == (46, 1, 6)
    (last,) = out.glob("part-000002*")
    kept = json.loads(pq.read_metadata(last).metadata[b"foveal"])
    assert kept["set_aside"][0][0] == "red/14.jpg"
    for path in list((data / "blue").iterdir()) + list((data / "green").iterdir())[:10]:
        path.unlink()
    assert api.embed(str(data), backbone=tiny, out=out, shard_rows=20, device="cpu")["shards"] == 2
    assert len(list(out.glob("*.parquet"))) == 2


def test_half_precision_is_half_the_bytes(photos: Path, cache: Path, tiny: str, table: Path, tmp_path: Path) -> None:
    api.embed(str(photos), backbone=tiny, out=tmp_path / "t", dtype="float16", device="cpu")
    half, whole = features(read(tmp_path / "t")), features(read(table))
    assert half.dtype == np.float16
    assert np.abs(half.astype(np.float32) - whole).max() <= 1e-3 * np.abs(whole).max()


def test_bad_input_is_one_clear_message(photos: Path, cache: Path, tiny: str, table: Path, tmp_path: Path) -> None:
    def embed(data: Path, **options: object) -> None:
        api.embed(str(data), **{"backbone": tiny, "device": "cpu", "out": tmp_path / "t", **options})  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="expected float32 or float16"):
        embed(photos, dtype="int8")
    with pytest.raises(UsageError, match="expected 1 or more"):
        embed(photos, shard_rows=0)
    with pytest.raises(UsageError, match=r"table of another command \(other dtype, shard_rows\)"):
        embed(photos, out=table, dtype="float16")
    with pytest.raises(UsageError, match="is not overwritten"):
        embed(photos, out=photos)
    with pytest.raises(DataError, match="does not exist"):
        embed(tmp_path / "shard-{0..3}.tar")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the images of bad can be read \(first: a.jpg"):
        embed(tmp_path / "bad")
