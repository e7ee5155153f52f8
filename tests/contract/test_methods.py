"""The contract of every method of the catalogue, whatever its family: Options, card, reproduction."""

import numpy as np
import pytest

from foveal.core import cards, catalogue
from foveal.core.errors import UsageError
from foveal.core.options import describe_options, options_to_dict, parse_options

METHODS = catalogue.names()
OWN = list(catalogue.families())
"""Methods of foveal itself; those of other packages keep their cards and reproductions where they like."""


@pytest.mark.parametrize("name", METHODS)
def test_options_round_trip(name: str):
    method = catalogue.create(name)
    assert parse_options(method.Options, options_to_dict(method.options), name) == method.options
    rows = describe_options(method.Options)
    assert len(rows) <= 10
    assert all(row["help"] for row in rows)
    with pytest.raises(UsageError, match="no-such-option: unknown"):
        catalogue.create(f"{name}:no-such-option=1")


@pytest.mark.parametrize("name", OWN)
def test_the_family_is_the_folder(name: str):
    cls = catalogue.get(name)
    assert cls.name == name
    assert cls.spec.family == catalogue.families()[name]


@pytest.mark.parametrize("name", OWN)
def test_card_is_complete(name: str):
    card = cards.read_card(name)
    spec = catalogue.get(name).spec
    assert card["name"] == name
    assert card.get("arxiv", "") == (spec.arxiv or "")
    assert card["year"] == spec.year
    assert len(card["claim"]) > 40
    assert card["expectation"]["checks"]
    measured = card["measured"]
    assert measured["seeds"] >= card["expectation"]["seeds"]
    for item in measured["checks"]:
        means = {key: value["mean"] for key, value in measured["values"].items()}
        assert cards.holds(item["check"], means) == item["held"], "a verdict does not follow from its numbers"
    assert [item["check"] for item in measured["checks"]] == card["expectation"]["checks"]


@pytest.mark.parametrize("name", OWN)
def test_the_tiny_reproduction_runs(name: str):
    from foveal.verbs.reproduce import reproduce

    result = reproduce(name, tiny=True)
    assert all(np.isfinite(value["mean"]) for value in result["values"].values())
    assert {item["check"] for item in result["checks"]} == set(cards.read_card(name)["expectation"]["checks"])
