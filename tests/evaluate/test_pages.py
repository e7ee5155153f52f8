"""report.html, comparison.html and the card: whole, closed to the network, and safe with any name."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from foveal.evaluate.card import write_card, yaml_lines
from foveal.evaluate.charts import (
    curves_chart,
    frontier_chart,
    overlap,
    reliability_chart,
    tick_labels,
    ticks,
    unknown_chart,
)
from foveal.evaluate.comparison import t_quantile, write_comparison
from foveal.evaluate.page import plain
from foveal.evaluate.report import verdict, write_report

VOID = {"meta", "img", "br"}
EVIL = '<script>alert("x")</script>&"\''
SURROGATE = os.fsdecode(b"caf\xe9.png")


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def report(tmp_path: Path, context: Any) -> Page:
    write_report(tmp_path / "report.html", context)
    return Page(tmp_path / "report.html")


def compared(methods: dict[str, float], seeds: int = 3, spread: float = 0.01) -> tuple[list[dict], dict]:
    """(one row per method, context) as `foveal compare` makes them."""
    rng = np.random.default_rng(0)
    each, rows = [], []
    for method, middle in methods.items():
        known = method not in ("majority", "brightness")
        values = middle + spread * rng.normal(size=seeds)
        cost = {"seconds": 0.4, "trained_params": 2562, "total_params": 3_384_624, "images_per_second": 290.3}
        row: dict[str, Any] = {"method": method, **(cost if known else dict.fromkeys(cost))}
        for seed, value in enumerate(values):
            points = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"), float(value))
            each.append({**row, "seed": seed, "split": "test", **points})
        summary = {**row, "seeds": seeds}
        for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"):
            summary[name] = float(values.mean())
            summary[f"{name}_std"] = float(values.std(ddof=1)) if seeds > 1 else None
        rows.append(summary)
    context = {
        "data": "cells",
        "backbone": "tf_efficientnet_lite0",
        "images": 2624,
        "classes": ["defective", "functional"],
        "reading_seconds": 9.2,
        "rows": each,
    }
    return rows, context


KINDS = {
    "two classes": {},
    "trained": {"trained": True},
    "multi-label": {"task": "multi-label", "classes": ("cat", "dog", "car")},
    "many classes": {"classes": tuple(f"species {k}" for k in range(60)), "n": 600},
    "dense confusion": {"classes": tuple(f"digit {k}" for k in range(10)), "n": 400},
}


@pytest.mark.parametrize("kind", KINDS)
def test_report_is_well_formed_and_asks_nothing_of_the_network(make_context, kind: str, tmp_path: Path):
    page = report(tmp_path, make_context(**KINDS[kind]))
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://|//[a-z0-9.-]+\.[a-z]{2,}", re.sub(r"base64,[\w+/=]*", "", text))


@pytest.mark.parametrize("kind", KINDS)
def test_report_holds_every_section_and_number(make_context, kind: str, tmp_path: Path):
    context = make_context(**KINDS[kind])
    page = report(tmp_path, context)
    metrics = context["metrics"]
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"):
        entry = metrics[name]
        assert f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]" in page.text
    for words in (
        "What was trained on what", "Data check", "broken.png: truncated", "How good it is", "majority class",
        "brightness alone", "By class", "Calibration", "Unknown images", "Most confident mistakes",
        "images/cell0001.png",         "3,384,624, of which 2,562 were set by training", "407.0 million",
        "6.2 ms for one image (onnxruntime, 2 threads)",
        "foveal predict", "foveal.load", "data fingerprint", "tf_efficientnet_lite0",
    ):  # fmt: skip
        assert words in page.text, words
    assert ("Learning curves" in page.text) == ("trained" in KINDS[kind])
    assert ("Why this method" in page.text) == ("trained" not in KINDS[kind])
    assert ("mAP" in page.text) == (kind == "multi-label")
    assert page.count("img") == 2


def test_confusion_counts_are_in_the_page(make_context, tmp_path: Path):
    context = make_context()
    context["metrics"]["confusion"] = [[311, 26], [21, 4298]]
    text = report(tmp_path, context).text
    for number in ("311", "26", "7.7%", "21", "4,298", "99.5%"):
        assert number in text


def test_many_classes_are_listed_hardest_first_with_their_mistakes(make_context, tmp_path: Path):
    context = make_context(**KINDS["many classes"])
    rows = context["metrics"]["per_class"]
    page = report(tmp_path, context)
    recalls = {name: row["recall"] for name, row in rows.items() if row["recall"] is not None}
    hardest, easiest = min(recalls, key=recalls.__getitem__), max(recalls, key=recalls.__getitem__)
    listing = page.text.split("60 classes, hardest first")[1]
    assert recalls[hardest] < recalls[easiest]
    assert listing.index(f"{hardest} ") < listing.index(f"{easiest} ")
    assert "Most frequent mistakes" in page.text


def test_hostile_names_stay_text(make_context, tmp_path: Path):
    context = make_context(classes=(EVIL, "fine"), name=EVIL, ids=(EVIL, SURROGATE))
    context["findings"]["leak"] = [{"images": [EVIL], "message": f"copies: {EVIL} {SURROGATE}"}]
    context["manifest"]["method"]["options"] = {"note": EVIL}
    context["cost"]["note"] = EVIL
    page = report(tmp_path, context)
    assert page.count("script") == 0
    assert page.text.count('<script>alert("x")</script>') >= 8
    assert "caf\\udce9.png" in page.text
    write_comparison(tmp_path / "c.html", *hostile_comparison())
    assert Page(tmp_path / "c.html").count("script") == 0
    write_card(tmp_path / "README.md", context)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card.split("---\n", 2)[2]
    assert front(card)["model-index"][0]["results"][0]["dataset"]["name"] == EVIL


def hostile_comparison():
    rows, context = compared({EVIL: 0.8, "majority": 0.5})
    context |= {"data": EVIL, "backbone": SURROGATE, "classes": [EVIL]}
    return rows, context


def test_names_with_control_characters_are_written_as_escapes():
    assert plain("a\x00b\x1b[0m\u202ec") == "a\\x00b\\x1b[0m\\u202ec"
    assert plain(SURROGATE) == "caf\\udce9.png"
    assert plain("naïve 細胞 🙂") == "naïve 細胞 🙂"


def test_context_is_left_alone(make_context, tmp_path: Path):
    context = make_context()
    before = copy.deepcopy(context)
    write_report(tmp_path / "r.html", context)
    write_card(tmp_path / "README.md", context)
    assert context == before


def entry(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("own", "rival", "tone", "words"),
    [
        (entry(0.8, 0.77, 0.83), entry(0.7, 0.66, 0.74), "good", "Clearly above brightness alone (0.700)"),
        (entry(0.8, 0.7, 0.9), entry(0.75, 0.66, 0.84), "care", "but the intervals overlap"),
        (entry(0.6, 0.5, 0.7), entry(0.7, 0.66, 0.74), "care", "not above brightness alone"),
        (entry(None), entry(0.7, 0.66, 0.74), "care", "too few"),
        (entry(0.8), entry(0.7), "", "That is above brightness alone"),
    ],
)
def test_verdict_compares_with_the_better_reference(own, rival, tone: str, words: str):
    references = {"majority": {"balanced_accuracy": entry(0.5, 0.5, 0.5)}, "brightness": {"balanced_accuracy": rival}}
    found = verdict({"n": 656, "split": "test", "balanced_accuracy": own, "references": references})
    assert found["tone"] == tone
    assert words in found["text"]


def test_report_of_little_and_of_nothing_wrong(make_context, tmp_path: Path):
    context = make_context(n=40)
    context["findings"], context["mistakes"], context["cost"] = {"duplicate": []}, [], {}
    context["metrics"]["references"] = {}
    context["metrics"]["auroc"] = entry(None)
    text = report(tmp_path, context).text
    assert "No mistake on the test images" in text
    assert "No corrupt files, copies, leaks" in text
    assert "not defined" in text


def test_thumbnails_that_are_no_image_are_left_out(make_context, tmp_path: Path):
    context = make_context()
    context["mistakes"][0]["thumbnail"] = b"<svg onload=alert(1)>"
    assert report(tmp_path, context).count("img") == 1


def test_long_findings_are_cut_and_counted(make_context, tmp_path: Path):
    context = make_context()
    context["findings"]["duplicate"] = [{"images": [], "message": f"pair {k} ends"} for k in range(40)]
    text = report(tmp_path, context).text
    assert "Groups of identical images: 40" in text
    assert "pair 11 ends" in text
    assert "pair 12 ends" not in text
    assert "and 28 more" in text


def test_reliability_dots_lie_where_the_rows_say():
    chart = reliability_chart([], [{"low": 0.4, "high": 0.6, "n": 9, "confidence": 0.5, "accuracy": 0.25}])
    ((x, y),) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert (float(x), float(y)) == (50 + 0.5 * 270, 12 + 0.75 * 270)


def test_unknown_chart_draws_both_and_the_threshold():
    chart = unknown_chart({"edges": [0.0, 1.0, 2.0], "known": [9, 1], "garbage": [0, 5]}, 1.0)
    assert len(re.findall(r'<path class="area', chart)) == 2
    (x,) = re.findall(r'class="threshold" x1="([\d.]+)"', chart)
    assert float(x) == 50 + 330 / 2


def test_unknown_chart_on_a_logarithmic_axis():
    chart = unknown_chart({"edges": [1.0, 10.0, 100.0], "known": [9, 1], "garbage": [0, 5], "log": True}, 10.0)
    (x,) = re.findall(r'class="threshold" x1="([\d.]+)"', chart)
    assert float(x) == 50 + 330 / 2
    labels = re.findall(r'y="207[^>]*>([^<]+)<', chart)
    assert sorted(map(float, labels)) == [1, 2, 5, 10, 20, 50, 100]


def test_curves_leave_out_what_was_not_measured():
    history = [{"epoch": 1, "val_loss": 0.5}, {"epoch": 2, "val_loss": float("nan")}, {"epoch": 3, "val_loss": 0.4}]
    chart = curves_chart(history, {"val_loss": "accent"}, "loss")
    assert chart is not None
    assert chart.count("<circle") == 2
    assert curves_chart(history, {"train_loss": "muted"}, "loss") is None


def test_a_curve_of_one_point_is_none():
    assert curves_chart([{"epoch": 1, "train_loss": 0.5}], {"train_loss": "muted"}, "loss") is None


def test_tick_labels_tell_their_values_apart():
    assert list(tick_labels([0.0, 0.25, 50_000.0, 2e6]).values()) == ["0", "0.25", "50k", "2M"]
    assert list(tick_labels([103.96, 103.98, 104.0]).values()) == ["103.96", "103.98", "104"]


def test_names_of_a_frontier_cover_nothing():
    rows = [
        {"name": name, "milliseconds": at, "balanced_accuracy": 0.5}
        for name, at in [("dense", 30.0), ("12 x 12", 29.0), ("9 x 9", 28.0), ("7 x 7", 27.5)]
    ]
    chart = frontier_chart(rows)
    assert chart is not None
    placed = re.findall(r'class="note" x="([\d.]+)" y="([\d.]+)">([^<]+)<', chart)
    assert [name for *_, name in placed] == [row["name"] for row in rows]
    boxes = [(float(x), float(y) - 9, float(x) + 6.5 * len(name), float(y) + 2) for x, y, name in placed]
    assert not any(overlap(one, other) for place, one in enumerate(boxes) for other in boxes[:place])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12), (0.501, 0.502), (1e6, 5e6), (2, 2)])
def test_ticks_are_round_and_inside(low: float, high: float):
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 11
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_comparison_page(tmp_path: Path):
    rows, context = compared({"gda-clip": 0.80, "linear": 0.78, "brightness": 0.70, "majority": 0.5})
    write_comparison(tmp_path / "c.html", rows, context)
    page = Page(tmp_path / "c.html")
    best = rows[0]
    assert f"gda-clip, {best['balanced_accuracy']:.3f} ± {best['balanced_accuracy_std']:.3f}" in page.text
    assert "All are above brightness alone" in page.text
    for words in ("3 seeds", "trained parameters", "2,562", "290.3", "0, 1, 2", "9.2 s", "majority class"):
        assert words in page.text, words
    assert page.count("u") == 2 * 4 * 3
    assert page.count("script") == 0


def test_comparison_says_which_methods_are_not_above_the_references(tmp_path: Path):
    rows, context = compared({"linear": 0.80, "vpt": 0.6, "brightness": 0.70, "majority": 0.5})
    write_comparison(tmp_path / "c.html", rows, context)
    assert "Not all are above brightness alone" in Page(tmp_path / "c.html").text
    rows, context = compared({"vpt": 0.6, "brightness": 0.70, "majority": 0.5})
    write_comparison(tmp_path / "c.html", rows, context)
    assert "It is not above brightness alone" in Page(tmp_path / "c.html").text


def test_comparison_of_one_seed_has_no_spread(tmp_path: Path):
    rows, context = compared({"linear": 0.8, "majority": 0.5}, seeds=1)
    write_comparison(tmp_path / "c.html", rows, context)
    page = Page(tmp_path / "c.html")
    assert "±" not in page.text
    assert "1 seed." in page.text
    assert page.count("u") == 0


def test_t_quantiles_equal_scipys():
    from scipy.stats import t

    for freedom in (1, 2, 5, 10, 11, 20, 100):
        assert t_quantile(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.003)


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n", 2)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_card_front_matter_is_what_the_hub_reads(make_context, kind: str, tmp_path: Path):
    from huggingface_hub import ModelCard

    context = make_context(**KINDS[kind])
    write_card(tmp_path / "README.md", context)
    fields = front((tmp_path / "README.md").read_text())
    assert fields["library_name"] == "foveal"
    assert fields["pipeline_tag"] == "image-classification"
    assert "datasets" not in fields
    data = ModelCard.load(tmp_path / "README.md").data
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    for name, kind_ in (("accuracy", "accuracy"), ("macro_f1", "f1"), ("auroc", "roc_auc")):
        assert found[kind_] == pytest.approx(context["metrics"][name]["value"], abs=1e-4)


def test_card_of_hub_data_names_it(make_context, tmp_path: Path):
    write_card(tmp_path / "README.md", make_context(name="hub:owner/cells"))
    fields = front((tmp_path / "README.md").read_text())
    assert fields["datasets"] == ["owner/cells"]
    assert fields["model-index"][0]["results"][0]["dataset"]["type"] == "owner/cells"


def test_card_tables_have_equal_columns_and_all_numbers(make_context, tmp_path: Path):
    context = make_context(classes=("a|b", "c`d_e*"))
    write_card(tmp_path / "README.md", context)
    card = (tmp_path / "README.md").read_text()
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    entry = context["metrics"]["balanced_accuracy"]
    assert f"{entry['value']:.3f} \\[{entry['low']:.3f}, {entry['high']:.3f}\\]" in card
    assert "a\\|b" in card
    assert "c\\`d\\_e\\*" in card
    for words in ("## Intended use and limits", "foveal.load", "brightness alone", "## Cost"):
        assert words in card


@pytest.mark.parametrize(
    "content",
    [
        {"a": "x: y # z", "b": ["- no", "'", "\\", "null", "1e3"], "c": 0.25, "d": 7, "e": [], "f": {}},
        {"list": [{"k": "v", "deep": [{"x": "细胞 🙂"}]}, {"k": "w"}]},
    ],
)
def test_yaml_reads_back_equal(content: dict[str, Any]):
    assert yaml.safe_load("\n".join(yaml_lines(content))) == content


def test_pages_need_no_heavy_library():
    """A warm fit cannot afford them."""
    code = (
        "import sys, foveal.evaluate.report, foveal.evaluate.card, foveal.evaluate.metrics, foveal.evaluate.ood;"
        "print([m for m in ('matplotlib', 'sklearn', 'timm', 'pandas', 'yaml', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
