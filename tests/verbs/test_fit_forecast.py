"""From a table of tracks to a Bundle that forecasts them, by the command line and in Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import foveal
from foveal.core.errors import BundleError, DataError, UsageError
from foveal.data.junctions import junctions

METHOD = "cab:epochs=2,batch_size=8,modes=4,history=3,future=4,width=16,anneal=4"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 junctions and tracks.csv, with a map at the last observed step of each."""
    folder = tmp_path_factory.mktemp("tracks")
    xy, maps, _ = junctions(24, 3, 4, seed=0)
    lines = ["agent,time,x,y,map,split"]
    for agent, track in enumerate(xy):
        Image.fromarray(maps[agent]).resize((80, 80)).save(folder / f"{agent}.png")
        split = "train" if agent < 14 else "val" if agent < 18 else "test"
        lines += [
            f"car-{agent:02d},{0.5 * step},{x:.3f},{y:.3f},{f'{agent}.png' if step == 3 else ''},{split}"
            for step, (x, y) in enumerate(track)
        ]
    (folder / "tracks.csv").write_text("\n".join(lines) + "\n")
    return folder / "tracks.csv"


@pytest.fixture(scope="module")
def bundle(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("bundles") / "tracks"
    return foveal.fit(str(table), task="forecast", method=METHOD, out=out, offline=True)


def test_the_bundle_holds_what_it_measured(bundle: Any, table: Path):
    metrics = bundle.metrics
    assert (metrics["n"], metrics["agents"], metrics["split"]) == (6, 6, "test")
    assert metrics["history"][1]["val_fde"] > 0
    assert metrics["fde"]["low"] <= metrics["fde"]["value"] <= metrics["fde"]["high"]
    assert metrics["references"]["straight on"]["fde"]["value"] > 0
    assert metrics["dispersion"]["value"] is None, "one forecast per agent: no instant is forecast twice"
    assert bundle.manifest["dt"] == 0.5
    assert bundle.manifest["data"]["splits"] == {"train": 14, "val": 4, "test": 6}
    assert {"report.html", "README.md", "cost.json", "bundle.json"} <= {file.name for file in bundle.path.iterdir()}
    page = (bundle.path / "report.html").read_text()
    assert "<path" in page
    assert "When forecasts settle" not in page
    assert not bundle.path.with_name("tracks.work").exists()
    again = foveal.fit(str(table), task="forecast", method=METHOD, out=bundle.path, offline=True)
    assert again.manifest == bundle.manifest, "the same command finds its Bundle there"


def test_tracks_without_maps_are_measured_over_time(table: Path, tmp_path: Path):
    bare = tmp_path / "bare.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    bare.write_text("\n".join(",".join([*row[:4], row[5]]) for row in rows) + "\n")
    plain = METHOD.replace("history=3,future=4", "history=1,future=2,contrast=0")
    fitted = foveal.fit(str(bare), task="forecast", method=plain, out=tmp_path / "out", offline=True)
    assert fitted.metrics["n"] == 6 * 5
    assert fitted.metrics["instants"] == 6 * 4
    assert fitted.metrics["dispersion"]["value"] > 0
    assert fitted.metrics["convergence"]["0.2"]["value"] <= fitted.metrics["convergence"]["5"]["value"] <= 1
    assert "When forecasts settle" in (fitted.path / "report.html").read_text()
    rows = fitted.predict(table)
    assert rows[0]["time"] == 3.5
    assert rows[0]["times"] == [4.0, 4.5]


def test_the_verb_predict(bundle: Any, table: Path, tmp_path: Path):
    said = foveal.predict(bundle.path, [table])
    rows = json.loads(json.dumps(said.to_dict(), allow_nan=False))
    assert [row["agent"] for row in rows] == [f"car-{agent:02d}" for agent in range(24)]
    assert rows[0]["time"] == 1.5
    assert rows[0]["times"] == [2.0, 2.5, 3.0, 3.5]
    assert len(rows[0]["modes"]) == 4
    assert rows[0]["trajectory"] == rows[0]["modes"][0]["trajectory"]
    assert sum(mode["probability"] for mode in rows[0]["modes"]) == pytest.approx(1, abs=1e-3)
    assert "car-00  at 3.5 s: " in said.to_text()
    short = table.with_name("short.csv")
    lines = table.read_text().splitlines()
    short.write_text("\n".join([*lines[:9], "new,0,0,0,0.png,test", "new,0.5,1,0,,test"]) + "\n")
    found = bundle.predict(short)
    assert found[0]["trajectory"] == rows[0]["trajectory"]
    assert found[1] == {"agent": "new", "modes": [], "error": "expected 4 steps up to a row with a map"}
    assert "cannot be forecast" in bundle.say(found)
    assert "FDE" in bundle.to_text()


def test_what_is_refused(bundle: Any, table: Path, tiny: str, tmp_path: Path):
    with pytest.raises(UsageError, match=r"is for forecast: expected a Bundle that classifies images or clips"):
        foveal.export(bundle.path)
    assert not (bundle.path / "model.onnx").exists()

    def fit(method: str, data: Path = table, **more: Any) -> None:
        foveal.fit(str(data), task="forecast", method=method, out=tmp_path / "out", offline=True, **more)

    with pytest.raises(UsageError, match="the loss has no lower bound"):
        fit("cab:clip=0")
    with pytest.raises(DataError, match=r"no agent has 4 \+ 1 \+ 12 steps"):
        fit("cab")
    with pytest.raises(UsageError, match="has an encoder of its own"):
        fit(METHOD, backbone=tiny)
    with pytest.raises(UsageError, match="--task forecast --method linear"):
        fit("linear")
    with pytest.raises(UsageError, match="holds the Bundle of another command"):
        foveal.fit(str(table), task="forecast", method=METHOD, out=bundle.path, seed=1, offline=True)
    slow = tmp_path / "slow.csv"
    slow.write_text("agent,time,x,y\n" + "".join(f"a,{time},{time},0\n" for time in range(9)))
    with pytest.raises(UsageError, match="add a column map, or use the plain CVAE"):
        fit(METHOD, slow.with_name(bare(table, tmp_path)))
    with pytest.raises(DataError, match=r"a row every 1 s, this network learned from one every 0.5 s"):
        bundle.predict(slow)
    with pytest.raises(DataError, match="has no column map, and this network reads maps"):
        bundle.predict(tmp_path / bare(table, tmp_path))
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    shutil.copytree(bundle.path, broken)
    stored = json.loads((broken / "bundle.json").read_text())
    (broken / "bundle.json").write_text(json.dumps({**stored, "dt": 0.0}))
    with pytest.raises(BundleError, match="dt: Input should be greater than 0"):
        foveal.load(broken)
    (broken / "bundle.json").write_text(json.dumps({**stored, "maps": False}))
    with pytest.raises(BundleError, match=r"do not fit its bundle.json"):
        foveal.load(broken).predict(tmp_path / bare(table, tmp_path))


def bare(table: Path, folder: Path) -> str:
    """The table without its maps."""
    rows = [line.split(",") for line in table.read_text().splitlines()]
    (folder / "bare.csv").write_text("\n".join(",".join([*row[:4], row[5]]) for row in rows) + "\n")
    return "bare.csv"
