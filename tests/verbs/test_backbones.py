from pathlib import Path

import pytest
import timm

import foveal
from foveal.core import cards
from foveal.core.errors import UsageError
from foveal.evaluate.architectures import architecture_cost


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> Path:
    return cache


def test_costs_are_the_published_ones():
    rows = {row["name"]: row for row in foveal.backbones("hornet_tiny_7x7").to_dict()}
    card = cards.read_card("hornet")["variants"]["hornet_tiny_7x7"]
    found = rows["hornet_tiny_7x7"]
    assert found["parameters"] == card["parameters"]
    assert round(found["macs"] / 1e9, 2) == card["gmacs"]
    assert found["weights"] == "none"
    assert found["size"] == 224


def test_costs_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch):
    counted = architecture_cost("test_resnet")
    assert counted["parameters"] == sum(p.numel() for p in timm.create_model("test_resnet").parameters())
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("counted twice"))
    assert architecture_cost("test_resnet") == counted


def test_filters():
    rows = foveal.backbones("test_*").to_dict()
    sizes = [row["parameters"] for row in rows]
    limit = sorted(sizes)[len(sizes) // 2] / 1e6
    few = foveal.backbones("test_*", max_parameters=limit).to_dict()
    assert {row["name"] for row in few} == {row["name"] for row in rows if row["parameters"] <= 1e6 * limit}
    assert 0 < len(few) < len(rows)
    assert {row["weights"] for row in foveal.backbones("tf_efficientnet_lite*", weights="package").to_dict()} == {
        "package"
    }


def test_speed_is_measured_when_asked():
    (row,) = foveal.backbones("test_resnet", measure=True).to_dict()
    assert row["images_per_second"] > 0
    assert "images_per_second" in foveal.backbones("test_resnet", measure=True).to_text()


def test_too_many_to_count_are_listed_without_costs_and_refused_when_costs_are_asked_for():
    rows = foveal.backbones("*net*").to_dict()
    assert len(rows) > 100
    assert "parameters" not in rows[0]
    with pytest.raises(UsageError, match=r"backbones match.*at most 100"):
        foveal.backbones("*net*", max_parameters=5)
    with pytest.raises(UsageError, match=r"'disk'.*package, cache, hub, none"):
        foveal.backbones("test_*", weights="disk")
