"""The decision table says what the cards measured and nothing more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from foveal.core import cards, catalogue

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def decision() -> Any:
    spec = importlib.util.spec_from_file_location("decision", ROOT / "scripts" / "decision.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decision"] = module
    spec.loader.exec_module(module)
    return module


def card(**values: list[float]) -> dict[str, Any]:
    named = {key.replace("__", "."): {"runs": runs} for key, runs in values.items()}
    return {"measured": {"values": {f"{key}.balanced_accuracy": value for key, value in named.items()}, "minutes": 1}}


def test_the_best_mean_comes_first_and_what_seeds_cannot_tell_apart_beside_it(decision: Any):
    row = {
        "clear": decision.Cell((0.90, 0.91, 0.92, 0.90, 0.91), "a"),
        "close": decision.Cell((0.91, 0.90, 0.92, 0.89, 0.91), "a"),
        "worse": decision.Cell((0.80, 0.81, 0.82, 0.80, 0.81), "a"),
    }
    assert decision.chosen(row) == ["clear", "close"]
    assert decision.chosen({name: row[name] for name in ("worse", "clear")}) == ["clear"]


def test_one_seed_proves_nothing_of_ties(decision: Any):
    row = {"a": decision.Cell((0.9,), "x"), "b": decision.Cell((0.8,), "x")}
    assert decision.chosen(row) == ["a"]


def test_cards_are_joined_only_over_the_same_draws(decision: Any):
    first = card(linear__digits_2=[0.7, 0.71], gda__digits_2=[0.8, 0.81])
    same = card(linear__digits_2=[0.7, 0.71], nn__digits_2=[0.9, 0.91])
    other = card(linear__digits_2=[0.6, 0.61], nn__digits_2=[0.9, 0.91])
    methods = ("linear", "gda", "nn")
    assert set(decision.few_shot({"a": first, "b": same}, methods)["digits", 2]) == {"linear", "gda", "nn"}
    assert set(decision.few_shot({"a": first, "b": other}, methods)["digits", 2]) == {"linear", "gda"}
    assert decision.few_shot({"a": card(linear__moon_2=[0.7])}, methods) == {}


def test_what_nobody_measured_is_unknown(decision: Any):
    specs = {name: catalogue.get(name).spec for name in ("linear", "full")}
    text = decision.page(specs, {name: {} for name in specs}, {}, {})
    assert "0." not in text.replace("95%", "")
    several = next(line for line in text.splitlines() if line.startswith("| several labels"))
    assert several.count("unknown") == 4
    assert "| no method yet | unknown |" in text


def test_the_page_agrees_with_the_cards(decision: Any):
    """Read back from the page: in every few-shot row the bold cells hold the highest mean of the cards."""
    text = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    section = text.split("## Few images, frozen backbone")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    names = [cell.partition("]")[0].strip("[") for cell in table[0][2:]]
    assert len(table) > 10
    for count, _, *cells in table[2:]:
        means = {
            name: float(cell.strip("*").split()[0]) for name, cell in zip(names, cells, strict=True) if cell[:1] in "*0"
        }
        bold = {name for name, cell in zip(names, cells, strict=True) if cell.startswith("**")}
        assert bold
        assert max(means, key=lambda name: means[name]) in bold, count
    values = cards.read_card("gda-clip")["measured"]["values"]
    shown = f"{values['gda-clip.digits_2.balanced_accuracy']['mean']:.3f} ± "
    assert shown in section
