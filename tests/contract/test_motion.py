"""The contract of every motion method that the catalogue finds, with maps and without.

Either the whole contract holds, or the method refuses the tracks with a clear message.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contract.capabilities import FAMILIES, as_documented, hooks
from torch import Tensor, nn

from foveal.core import catalogue
from foveal.core.errors import UsageError
from foveal.core.families.motion import Motion, as_planes
from foveal.core.options import options_to_dict, parse_options
from foveal.data.junctions import junctions
from foveal.data.tracks import Tracks, in_memory
from foveal.train.loop import train
from foveal.train.tracks import TrackFeed

METHODS = catalogue.names("motion")
LIGHT = {"epochs": 1, "batch_size": 4, "modes": 4, "history": 3, "future": 4, "width": 16, "anneal": 2}


def light(name: str) -> Motion:
    fields = {field.name for field in dataclasses.fields(catalogue.get(name).Options)}
    method = catalogue.create(name, **{key: value for key, value in LIGHT.items() if key in fields})
    assert isinstance(method, Motion)
    return method


@pytest.fixture(scope="module", params=["maps", "no maps"])
def tracks(request: pytest.FixtureRequest) -> Tracks:
    xy, maps, _ = junctions(12, 3, 4, seed=0)
    return in_memory(xy, 0.5, maps if request.param == "maps" else None, observed=3)


def untrained(name: str, tracks: Tracks) -> nn.Module:
    torch.manual_seed(1)
    return light(name).attach(tracks.maps is not None, 1.0)


def fed(name: str, tracks: Tracks) -> TrackFeed:
    window = light(name).window()
    return TrackFeed(tracks, tracks.starts(*window), window)


def trained(name: str, tracks: Tracks, work: Path) -> nn.Module:
    method = light(name)
    return train(
        method, untrained(name, tracks), fed(name, tracks), 0, recipe=method.recipe(), device="cpu", work=work
    ).model


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, tracks: Tracks, tmp_path: Path):
    method = light(name)
    try:
        model = untrained(name, tracks)
    except UsageError as refusal:
        assert tracks.maps is None
        assert len(str(refusal)) > 30, f"refusal says too little: {refusal}"
        return
    feed = fed(name, tracks)
    past = torch.from_numpy(feed.past)
    maps = None
    if tracks.maps is not None:
        maps = as_planes(torch.from_numpy(np.stack([tracks.map(int(row)) for row in feed.rows])))
    kept = past.clone(), None if maps is None else maps.clone()
    before = method.forecast(model.eval(), past, maps)[0].detach()
    first = trained(name, tracks, tmp_path / "first")
    with torch.no_grad():
        modes, weights = method.forecast(first, past, maps)
    again = trained(name, tracks, tmp_path / "again")
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), f"the same seed gave another {key}"
    assert modes.shape[0] == len(past)
    assert modes.shape[2:] == (4, 2)
    assert torch.isfinite(modes).all()
    assert torch.allclose(weights.sum(1), torch.ones(len(past)))
    assert not torch.equal(modes, before), "training changed nothing"
    assert torch.equal(past, kept[0]), "its argument changed"
    if maps is not None:
        assert kept[1] is not None
        assert torch.equal(maps, kept[1]), "its argument changed"
    assert hooks(first) == 0
    assert not first.training

    other = untrained(name, tracks)
    other.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(method.forecast(other.eval(), past, maps)[0], modes), "saved and loaded it answers otherwise"
        alone = torch.cat(
            [method.forecast(first, past[n : n + 1], None if maps is None else maps[n : n + 1])[1] for n in range(3)]
        )
    assert torch.allclose(alone, weights[:3], atol=1e-5), "windows see each other"
    for family in FAMILIES:  # it reads no backbone, so it works whatever kind that would be
        as_documented(name, family, "works")


@pytest.mark.parametrize("name", METHODS)
def test_a_crash_leaves_no_hooks(name: str, tmp_path: Path):
    xy, maps, _ = junctions(8, 3, 4, seed=0)
    tracks = in_memory(xy, 0.5, maps, observed=3)
    method, model = light(name), untrained(name, tracks)

    class Crash(TrackFeed):
        def ready(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            raise ArithmeticError

    feed = Crash(tracks, tracks.starts(*method.window()), method.window())
    with pytest.raises(ArithmeticError):
        train(method, model, feed, 0, recipe=method.recipe(), device="cpu", work=tmp_path)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", METHODS)
def test_options_go_to_json_and_back(name: str):
    method = light(name)
    assert parse_options(type(method).Options, options_to_dict(method.options), name) == method.options
    assert "forecast" in method.spec.tasks
