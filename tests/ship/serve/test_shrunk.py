"""A Bundle that `foveal shrink` made, behind `foveal serve`."""

from functools import partial
from pathlib import Path

import pytest
from tests.ship.serve.conftest import serving

import foveal
from foveal.ship import beside
from foveal.verbs import _shrunk


def test_a_shrunk_bundle_answers_over_http_as_it_predicts(
    colours: foveal.Bundle, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_shrunk, "timed_beside", partial(beside.timed_beside, seconds=0.02))
    foveal.shrink(colours.path, method="powerquant:bits=6", out=tmp_path / "small", max_drop=1.0, offline=True)
    expected = foveal.load(tmp_path / "small").predict(good)
    with serving(tmp_path / "small", "--no-page", "--threads", 1) as server:
        rows = server.post("/predict", files=[("files", (str(file), file.read_bytes())) for file in good]).json()
        asked = [("files", (good[0].name, good[0].read_bytes()))]
        explained = server.post("/explain?method=eigen-cam", files=asked)
        assert server.get("/model").json()["classes"] == ["blue", "green", "red"]
    for row, other in zip(rows, expected, strict=True):
        assert (row["label"], row["unknown"]) == (other["label"], other["unknown"])
        assert dict(row["top"]) == pytest.approx(dict(other["top"]), abs=1e-4)
    assert explained.status_code == 200, explained.text
